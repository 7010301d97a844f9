"""`htc-vlm token-map`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import htc_vlm_cli

from .. import tiny_runs as tiny


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    tiny.noise(0).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def call(picture: Path, *more: str) -> int:
    output = picture.with_name("out.png")
    return htc_vlm_cli.main(
        ["token-map", str(picture), "--output", str(output), "--model", str(tiny.checkpoint(tiny.NONE)), *more]
    )


def test_a_picture_is_drawn_and_its_stages_are_named(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget makes the settings, and --set adds to them: ToMe has no place inside this tower."""
    assert call(picture, "--method", "tome", "--budget", "2", "--set", "place=after_tower", "--set", "metric=features") == 0
    assert "layers 0 to 1: 2 tokens from 4 patches" in capsys.readouterr().out
    with Image.open(picture.with_name("out.png")) as drawn:
        assert drawn.size[0] > drawn.size[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "tome", "--set", "n_keep=2"], "place='after_tower'"),
        (["--method", "fastv", "--set", "n_keep=5", "--set", "layer=1"], "n_keep is 5; there are only 4"),
        (["--method", "fastv", "--set", "n_keep"], "has no '='"),
        (["--method", "voco"], "must be trained"),
        (["--method", "none"], "no sources were recorded"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    picture: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, with what works instead."""
    assert call(picture, *more) == htc_vlm_cli.EXIT_REFUSED
    assert message in capsys.readouterr().err
