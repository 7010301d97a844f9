"""What the pages in docs/ say about the code is there: files, names in them, links; the paper map leaves nothing out.

Code is named in backticks as `path::name` or `path`, from src/htc_vlm or from the root of the repository. A bare
`report.json` is no such name: it is a file that a run writes.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ROOTS = (REPO / "src" / "htc_vlm", REPO)
MAP = REPO / "docs" / "paper-map.md"
PAGES = [*sorted((REPO / "docs").glob("*.md")), REPO / "CONTRIBUTING.md"]
CODE = re.compile(r"`(?P<path>[\w./-]+\.py|[\w./-]+/[\w.-]+\.(?:yaml|json|md))(?:::(?P<name>[\w.]+))?`")
LINK = re.compile(r"\]\((?P<target>[^)#:]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
PAPER = [
    *(f"Eq. {number}" for number in range(1, 11)),
    *(f"line {number}" for number in range(1, 10)),
    *(f"Table {number}" for number in range(1, 5)),
    *(f"Figure {number}" for number in range(1, 4)),
]


def names_in(file: Path) -> set[str]:
    """Everything that a Python file defines: functions, classes, constants, and what classes hold, as `Class.member`."""
    return _names(ast.parse(file.read_text(encoding="utf-8")), "")


def _names(node: ast.Module | ast.ClassDef, prefix: str) -> set[str]:
    found: set[str] = set()
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            found |= {prefix + child.name} | _names(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            found.add(prefix + child.name)
        elif isinstance(child, ast.AnnAssign):
            found.add(prefix + ast.unparse(child.target))
        elif isinstance(child, ast.Assign):
            found |= {prefix + ast.unparse(target) for target in child.targets}
    return found


@functools.cache
def wrong(reference: str) -> str | None:
    """What is wrong with one `path` or `path::name`; None if it is there."""
    path, _, name = reference.partition("::")
    files = [root / path for root in ROOTS if (root / path).is_file()]
    if not files:
        return f"{path} does not exist"
    if name and name not in names_in(files[0]):
        return f"{path} has no {name}"
    return None


def references(text: str) -> list[str]:
    """The `path` and `path::name` of a page, those in code blocks left out."""
    found = CODE.finditer(FENCED.sub("", text))
    return [match["path"] + (f"::{match['name']}" if match["name"] else "") for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_page_names_exists(page: Path) -> None:
    """A map that points at a renamed function sends every reader astray, and nobody notices."""
    assert [wrong(one) for one in references(page.read_text(encoding="utf-8")) if wrong(one)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """A link to a file that was moved."""
    targets = [match["target"] for match in LINK.finditer(FENCED.sub("", page.read_text(encoding="utf-8")))]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_map_has_one_row_for_everything_in_the_paper() -> None:
    """An equation left out reads as one that is implemented somewhere."""
    rows = [line.split("|")[1].strip() for line in MAP.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [item for item in PAPER if rows.count(item) != 1] == []


def test_a_wrong_reference_is_found() -> None:
    """A checker that never fails is no checker."""
    assert wrong("ops/mask.py") == "ops/mask.py does not exist"
    assert wrong("ops/masks.py::invisible") == "ops/masks.py has no invisible"
    assert wrong("ops/masks.py::visible") is None
    assert wrong("compressors/htc.py::HtcSettings.n_anchors") is None
    assert references("see `a/b.py::C.d`, `e/f.yaml`, `report.json`\n```python\n`x.py`\n```\n") == ["a/b.py::C.d", "e/f.yaml"]
