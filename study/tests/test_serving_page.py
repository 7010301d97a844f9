"""docs/serving.md is what the committed result says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def test_the_page_is_built_from_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number typed by hand outlives the run that it came from."""
    spec = importlib.util.spec_from_file_location("script_serving", REPO / "study" / "serving.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["serving.py", "--check"])
    assert module.main() == 0
