"""The scripts beside the package import, and say what they take."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (REPO / folder).glob("*.py"))


def test_there_are_scripts() -> None:
    """An empty list would test nothing."""
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_imports_and_answers_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else runs them: a renamed function would be noticed by the first user."""
    spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    assert f"usage: {script.name}" in capsys.readouterr().out


def test_the_page_of_results_tells_where_the_attention_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: anchors got 10 and 30 % in two layers, the even share of 4 among 41 tokens is 9.8 %."""
    spec = importlib.util.spec_from_file_location("script_results", REPO / "study" / "page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.attention(tmp_path) == module.probing(tmp_path) == ""  # nothing was run: no section
    layers = {"anchors": [0.1, 0.3], "patches": [0.5, 0.5], "bottleneck": [0.4, 0.2]}
    mean = {name: sum(row) / 2 for name, row in layers.items()}
    htc = {"model": "m", "label": "HTC", "n_anchors": 4, "even_share_of_anchors": 4 / 41, "mean_of_layers": mean}
    htc["layers"] = layers
    voco = {**htc, "label": "VoCo", "n_anchors": 0, "even_share_of_anchors": 0.0}
    (tmp_path / "heatmap").mkdir()
    text = json.dumps({"pictures": ["a", "b"], "models": [htc, voco], "command": "htc-vlm heatmap"})
    (tmp_path / "heatmap" / "figure3.json").write_text(text)
    lines = module.attention(tmp_path).splitlines()
    assert "| HTC | 20.0 % | 50.0 % | 30.0 % | 9.8 % | 30.0 % in layer 1 |" in lines
    assert "| VoCo | 20.0 % | 50.0 % | 30.0 % | 0.0 % | no anchors |" in lines
