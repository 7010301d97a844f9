"""Rebuilds every page and table that is made from results or code; `make table` runs it. --check only compares.

    python -m study.pages [--check]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from htc_vlm.testing import family_table
from study import methods, page, performance, readme, serving, store_page
from study.generated import ROOT, check_or_write


def families() -> dict[Path, str]:
    """docs/families.md, tried on tiny models."""
    return {ROOT / "docs" / "families.md": family_table.page()}


# In this order: the README's table reads the page of families.
PAGES: dict[str, Callable[[], Mapping[Path, str]]] = {
    "results": page.files, "methods": methods.files, "performance": performance.files, "serving": serving.files,
    "store": store_page.files, "families": families, "readme": readme.files,
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(check_or_write(PAGES.values(), __doc__, page.draw_plots))
