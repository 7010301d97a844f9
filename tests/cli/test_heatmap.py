"""`htc-vlm heatmap`: a picture that opens, or one line."""

from __future__ import annotations

import json
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


def test_two_models_side_by_side_with_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figure 3: the paper's claim is a comparison; its numbers belong in a file, not in a colour bar."""
    models = ["--model", str(tiny.checkpoint(tiny.HTC)), "--model", str(tiny.checkpoint(tiny.VOCO))]
    out = ["--output", str(tmp_path / "map.png"), "--numbers", str(tmp_path / "map.json")]
    assert main(["heatmap", "--samples", "2", "--as", "rows", *models, "--label", "HTC", "--label", "VoCo", *out]) == 0
    found = json.loads((tmp_path / "map.json").read_text())
    assert [row["label"] for row in found["models"]] == ["HTC", "VoCo"] and found["pictures"] == ["test/0", "test/1"]
    assert [row["n_anchors"] for row in found["models"]] == [2, 0]
    assert found["models"][0]["even_share_of_anchors"] == pytest.approx(2 / 7)  # 2 anchors, 4 patches, itself
    for row in found["models"]:
        assert sum(row["mean_of_layers"].values()) == pytest.approx(1, abs=1e-4)
    assert main(["heatmap", "--samples", "1", *models, *out]) == 0
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.size[0] > 4 * drawn.size[1]  # picture, and map and bars of each model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "not both and not neither"),
        (["a.png", "--samples", "2"], "not both and not neither"),
        (["--samples", "0"], "give 1 to 1000"),
        (["a.png", "--label", "a", "--label", "b"], "2 labels for 1 models"),
    ],
)
def test_words_that_contradict_each_other_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded."""
    assert main(["heatmap", *words, "--output", str(tmp_path / "map.png")]) == 2
    assert message in capsys.readouterr().err
