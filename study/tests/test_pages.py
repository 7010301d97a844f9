"""Generated pages say what the committed results and the code say."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from study.generated import ROOT, out_of_date, with_blocks
from study.methods import table
from study.pages import PAGES


@pytest.mark.parametrize("name", list(PAGES))
def test_a_generated_page_is_current(name: str) -> None:
    """A number typed by hand, or left behind by a newer result, would be found by nobody else. `make table` rebuilds it."""
    stale = out_of_date(PAGES[name]())
    assert stale == [], "run: make table"


def test_only_what_stands_between_the_marks_is_made_anew(tmp_path: Path) -> None:
    """Text written by hand must outlive the table; a page that lost its marks would never change again."""
    page = tmp_path / "page.md"
    page.write_text("by hand\n<!-- a -->\nold\n<!-- /a -->\nbelow\n")
    assert with_blocks(page, {"a": lambda: r"\1 new"}) == {page: "by hand\n<!-- a -->\n\\1 new\n<!-- /a -->\nbelow\n"}
    with pytest.raises(ValueError, match="page.md has no block <!-- b -->"):
        with_blocks(page, {"b": lambda: ""})


def test_every_result_file_loads_and_names_no_folder_of_a_machine() -> None:
    """A path of one machine tells a reader nothing, and its owner's name to everybody."""
    files = sorted((ROOT / "study" / "results").rglob("*.json"))
    commands = {file: json.loads(file.read_text(encoding="utf-8")).get("command", "") for file in files}
    assert len(files) > 50
    assert not [file.name for file, command in commands.items() if any(word.startswith("/") for word in shlex.split(command))]


def test_the_table_of_methods_has_a_line_for_each_row() -> None:
    """A method that was measured and is not shown."""
    result = json.loads((ROOT / "study" / "results" / "methods" / "cpu.json").read_text(encoding="utf-8"))
    assert table(result).count("\n| `") == len(result["rows"]) - 1 > 10
