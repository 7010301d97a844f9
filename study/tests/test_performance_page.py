"""The blocks of docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from study import performance


def test_without_a_gpu_run_the_page_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CPU ratios in a column of their own must not pass for the target's."""
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    assert performance.ratios().count("not yet run") == 5
    cpu = {"device_details": {"kind": "cpu"}, "ratios": dict.fromkeys(performance.TARGETS, 0.5)}
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    assert performance.ratios().count("not yet run") == 5 and performance.ratios().count("| 0.5 |") == 5
    (tmp_path / "h100.json").write_text(json.dumps(cpu | {"device_details": {"kind": "cuda"}}))
    assert "not yet run" not in performance.ratios() and "| h100 | cpu |" in performance.ratios()


def test_expected_floors_are_worked_out_by_hand() -> None:
    """32 layers of 202.4 M weights and the head, 2 bytes each, at 3 TB/s: 4.4 ms; 8.178 TFLOPs at 750 TFLOP/s: 10.9 ms."""
    text = performance.expected()
    lines = text.splitlines()
    assert lines[2] == "| 1 | 4.4 | memory | 10.9 | 2.48 | 15.8 |"
    assert lines[3] == "| 8 | 5.54 | arithmetic | 87.2 | 15.8 | 15.8 |"
    assert "13.2 GB" in text and "20.5 MiB" in text and "308.0 MiB" in text
