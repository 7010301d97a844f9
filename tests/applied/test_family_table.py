"""docs/families.md is what the code does."""

from __future__ import annotations

from pathlib import Path

from htc_vlm.testing.family_table import page


def test_the_page_of_families_is_current() -> None:
    """A table of promises that nobody keeps."""
    written = Path(__file__).parents[2] / "docs" / "families.md"
    assert written.read_text(encoding="utf-8") == page(), "run: make table"
