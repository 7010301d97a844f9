"""docs/performance.md is what the committed results say."""

from __future__ import annotations

import doctest
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_performance", REPO / "study" / "performance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_built_from_the_results(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number typed by hand outlives the run that it came from."""
    monkeypatch.setattr(sys, "argv", ["performance.py", "--check"])
    assert script.main() == 0


def test_without_a_gpu_run_the_page_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CPU ratios in a column of their own must not pass for the target's."""
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    assert script.ratios().count("not yet run") == 5
    cpu = {"device_details": {"kind": "cpu"}, "ratios": dict.fromkeys(script.TARGETS, 0.5)}
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    assert script.ratios().count("not yet run") == 5 and script.ratios().count("| 0.5 |") == 5
    (tmp_path / "h100.json").write_text(json.dumps(cpu | {"device_details": {"kind": "cuda"}}))
    assert "not yet run" not in script.ratios() and "| h100 | cpu |" in script.ratios()


def test_expected_floors_are_worked_out_by_hand(script: ModuleType) -> None:
    """32 layers of 202.4 M weights and the head, 2 bytes each, at 3 TB/s: 4.4 ms; 8.178 TFLOPs at 750 TFLOP/s: 10.9 ms."""
    lines = script.expected().splitlines()
    assert lines[2] == "| 1 | 4.4 | memory | 10.9 | 2.48 | 15.8 |"
    assert lines[3] == "| 8 | 5.54 | arithmetic | 87.2 | 15.8 | 15.8 |"
    assert "13.2 GB" in script.expected() and "20.5 MiB" in script.expected() and "308.0 MiB" in script.expected()


def test_examples_in_the_docstrings_run(script: ModuleType) -> None:
    """study/ is not among the folders whose doctests pytest collects."""
    tried = doctest.testmod(script)
    assert tried.failed == 0 and tried.attempted
