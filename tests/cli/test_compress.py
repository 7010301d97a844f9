"""`htc-vlm compress`: a folder becomes one file of cells; what cannot be read is named, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from htc_vlm.model.answering import Answerer
from htc_vlm.model.compressed import CompressedImages
from htc_vlm_cli import main

from .. import tiny_runs as tiny

Capture = pytest.CaptureFixture[str]


def compressed(capsys: Capture, *words: str) -> tuple[int, str, list[str]]:
    """(exit code, stdout, our own lines on stderr)"""
    capsys.readouterr()
    code = main(["compress", *words, "--model", str(tiny.checkpoint(tiny.HTC))])
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("htc-vlm")]


def test_a_folder_becomes_one_file_in_the_order_of_its_names(tmp_path: Path, capsys: Capture) -> None:
    """Batches of 2 over 3 pictures: each has its own cells, at its own number."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "cab":
        tiny.noise(ord(name)).save(folder / f"{name}.png")
    file = tmp_path / "cells.safetensors"
    code, out, lines = compressed(capsys, str(folder), "--output", str(file), "--batch-size", "2")
    report = json.loads(out)
    images = CompressedImages.load(file)
    assert (code, lines, [Path(name).name for name in report["pictures"]]) == (0, [], ["a.png", "b.png", "c.png"])
    answerer = Answerer(*tiny.loaded(tiny.HTC))
    alone = torch.cat([answerer.encode([tiny.noise(ord(name))]).kv for name in "abc"])  # type: ignore[union-attr]
    torch.testing.assert_close(images.kv, alone, atol=1e-5, rtol=0)
    assert report["bytes_per_picture"] == tiny.N_LAYERS * 2 * tiny.N_KV_HEADS * tiny.HEAD_DIM * 4


def test_a_hostile_folder_loses_nothing(tmp_path: Path, capsys: Capture) -> None:
    """All good pictures are in the file, all bad ones (folders too) are named, exit code 2."""
    folder, file = tiny.hostile_folder(tmp_path / "wild"), tmp_path / "cells.safetensors"
    code, out, lines = compressed(capsys, str(folder), "--output", str(file))
    report = json.loads(out)
    assert (code, report["refused"], len(CompressedImages.load(file))) == (2, len(tiny.BAD), len(tiny.GOOD))
    assert sorted(Path(name).name for name in report["pictures"]) == sorted(tiny.GOOD)
    assert all(any(name in line for line in lines) for name in tiny.BAD) and len(lines) == len(tiny.BAD)


def test_what_cannot_work_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """Nothing to compress, nowhere to write (found before the work, not after), no bottleneck."""
    tiny.noise(0).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    good, output = str(tmp_path / "a.png"), ["--output", str(tmp_path / "x.st")]
    cases = {
        (str(tmp_path / "empty"), *output): "no picture could be read",
        (good, "--output", str(tmp_path / "no" / "x.st")): "its folder does not exist",
        (good, *output, "--batch-size", "0"): "--batch-size is 0",
    }
    for words, message in cases.items():
        code, out, lines = compressed(capsys, *words)
        assert (code, out) == (2, "") and message in lines[-1]
    assert main(["compress", good, *output, "--model", str(tiny.checkpoint(tiny.NONE))]) == 2
    assert "has no bottleneck" in capsys.readouterr().err
    assert not (tmp_path / "x.st").exists()
