"""Sphinx: the pages of this folder and the API pages of the public names. `make docs` builds it, strictly."""

from __future__ import annotations

import posixpath
import re
from typing import Any

from sphinx.application import Sphinx

project = "htc-vlm"
author = "the htc-vlm authors"
copyright = "2026, the htc-vlm authors"  # noqa: A001  (Sphinx's name)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "specs"]
html_theme = "furo"
html_title = "htc-vlm"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def name_source(app: Sphinx, document: str, content: list[str]) -> None:
    """Links that leave docs/ (../src/..., ../LOG.md) become the path in the repository: a site has no such pages."""

    def path(match: re.Match[str]) -> str:
        return f"{match[1]} (`{posixpath.normpath(posixpath.join('docs', match[2]))}`)"

    content[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+|specs/[^)#\s]+)(?:#[^)\s]*)?\)", path, content[0])


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `names` in single backticks: shown as literals, line breaks kept."""
    text = "\n".join(lines)
    examples = text.find(">>>")
    prose, rest = (text, "") if examples < 0 else (text[:examples], text[examples:])
    prose = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", prose)
    prose = re.sub(r"([*|_])(?=\w)|(?<=\w)([*|])", lambda m: "\\" + m[0], prose) if "``" not in prose else prose
    block = [f"| {line}" if line.strip() else "" for line in prose.rstrip().split("\n")]
    lines[:] = [*block, "", *rest.split("\n"), ""]


def setup(app: Sphinx) -> None:
    app.connect("source-read", name_source)
    app.connect("autodoc-process-docstring", plain_docstring)
