"""`python -m study probe`: a table and a result file, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from study.__main__ import main
from tests import tiny_runs as tiny


def test_it_prints_a_table_and_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the numbers come from is in the file."""
    out = tmp_path / "probe" / "tiny.json"
    words = ["probe", str(tiny.checkpoint(tiny.VOCO)), "--images", "12", "--test-images", "8", "--output", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "| majority |" in printed and printed.splitlines()[-1] == str(out)
    result = json.loads(out.read_text())
    assert {"commit", "dirty", "versions", "command", "seconds", "recipe", "compressor", "seed"} <= set(result)


def test_too_many_scenes_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test split has 1000."""
    words = ["probe", str(tiny.checkpoint(tiny.NONE)), "--images", "12", "--test-images", "2000", "--output", "x.json"]
    assert main(words) == 2
    assert "give 1 to 1000" in capsys.readouterr().err
