"""`htc-vlm heatmap`: a picture that opens, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from htc_vlm_cli import main

from .. import tiny_runs as tiny


def test_it_draws_one_row_per_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pictures make it taller than one."""
    heights = []
    for n in (1, 2):
        files = [str(tmp_path / f"{i}.png") for i in range(n)]
        for i, file in enumerate(files):
            tiny.noise(i).save(file)
        out = tmp_path / f"map{n}.png"
        assert main(["heatmap", *files, "--output", str(out), "--model", str(tiny.checkpoint(tiny.HTC))]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        with Image.open(out) as drawn:
            heights.append(drawn.size[1])
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing picture; a model without a bottleneck."""
    tiny.noise(0).save(tmp_path / "a.png")
    out = ["--output", str(tmp_path / "map.png"), "--model", str(tiny.checkpoint(tiny.NONE))]
    assert main(["heatmap", str(tmp_path / "b.png"), *out]) == 2
    assert "b.png: no such file" in capsys.readouterr().err
    assert main(["heatmap", str(tmp_path / "a.png"), *out]) == 2
    assert "has no bottleneck" in capsys.readouterr().err
    assert not (tmp_path / "map.png").exists()
