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
    """All good pictures are in the file, all bad ones are named, exit code 1; an empty folder named like a picture is none."""
    folder, file = tiny.hostile_folder(tmp_path / "wild"), tmp_path / "cells.safetensors"
    code, out, lines = compressed(capsys, str(folder), "--output", str(file))
    report = json.loads(out)
    assert (code, report["refused"], len(CompressedImages.load(file))) == (1, len(tiny.BAD) - 1, len(tiny.GOOD))
    assert sorted(Path(name).name for name in report["pictures"]) == sorted(tiny.GOOD)
    bad = [name for name in tiny.BAD if name != "folder.png"]
    assert all(any(name in line for line in lines) for name in bad) and len(lines) == len(bad)


def test_what_cannot_work_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """Nothing to compress, nowhere to write (found before the work, not after), no bottleneck."""
    tiny.noise(0).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    good, output = str(tmp_path / "a.png"), ["--output", str(tmp_path / "x.st")]
    cases = {
        (str(tmp_path / "empty"), *output): "no picture among these, so there is nothing to write",
        (good, *output, "--device", "gpu"): "--device 'gpu': no kind of device; write e.g. cpu",
        (str(tmp_path / "text.png"), *output): "no picture could be read",
        (good, "--output", str(tmp_path / "no" / "x.st")): "its folder does not exist",
        (good, *output, "--batch-size", "0"): "--batch-size is 0",
    }
    for words, message in cases.items():
        code, out, lines = compressed(capsys, *words)
        assert (code, out) == (2, "") and message in lines[-1]
    assert main(["compress", good, *output, "--model", str(tiny.checkpoint(tiny.NONE))]) == 2
    assert "has no bottleneck" in capsys.readouterr().err
    assert not (tmp_path / "x.st").exists()


def photos(folder: Path, n: int) -> Path:
    """n pictures, every second one in a subfolder, and a file that is none."""
    (folder / "trip").mkdir(parents=True)
    for i in range(n):
        tiny.noise(i).save((folder / "trip" if i % 2 else folder) / f"{i}.png")
    (folder / "notes.txt").write_text("sunny")
    return folder


def test_subfolders_are_read_and_other_files_are_counted(tmp_path: Path, capsys: Capture) -> None:
    """Subfolders were left out, each as a refused picture; so was every side file of a photo program."""
    folder = photos(tmp_path / "photos", 4)
    (folder / ".thumbnails").mkdir()
    tiny.noise(9).save(folder / ".thumbnails" / "0.png")
    code, out, lines = compressed(capsys, str(folder), "--output", str(tmp_path / "album"))
    names = [str(Path(name).relative_to(folder)) for name in json.loads(out)["pictures"]]
    assert (code, names) == (0, ["0.png", "2.png", "trip/1.png", "trip/3.png"])
    assert len(lines) == 1 and "left out: 1 files whose ending is no picture's, e.g." in lines[0] and "notes.txt" in lines[0]


class Stopped:
    """An answerer's `encode` that fails at its second batch."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.n_calls, self.real = error, 0, Answerer.encode

    def encode(self, answerer: Answerer, pictures: object) -> object:
        self.n_calls += 1
        if self.n_calls == 2:
            raise self.error
        return self.real(answerer, pictures)  # type: ignore[arg-type]


def test_what_was_done_before_ctrl_c_is_kept(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 photos, Ctrl-C at the last one: nothing was kept."""
    folder, file = photos(tmp_path / "photos", 4), tmp_path / "album"
    stopped = Stopped(KeyboardInterrupt())
    monkeypatch.setattr(Answerer, "encode", lambda self, pictures, maps=False: stopped.encode(self, pictures))
    code, out, lines = compressed(capsys, str(folder), "--output", str(file), "--batch-size", "2")
    assert (code, len(CompressedImages.load(file)), len(json.loads(out)["pictures"])) == (130, 2, 2)
    assert lines[-1].endswith(f"stopped: 2 of 4 pictures are in {file}")


def test_a_run_that_is_stopped_does_not_replace_a_whole_album(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The album of yesterday had all four; also when it is a bug that stops the run."""
    folder, file = photos(tmp_path / "photos", 4), tmp_path / "album"
    assert compressed(capsys, str(folder), "--output", str(file))[0] == 0
    before = file.read_bytes()
    stopped = Stopped(RuntimeError("out of memory"))
    monkeypatch.setattr(Answerer, "encode", lambda self, pictures, maps=False: stopped.encode(self, pictures))
    with pytest.raises(RuntimeError, match="out of memory"):
        compressed(capsys, str(folder), "--output", str(file), "--batch-size", "2")
    assert file.read_bytes() == before and len(CompressedImages.load(tmp_path / "album.unfinished")) == 2
    assert compressed(capsys, str(folder), "--output", str(file))[0] == 0
    assert not (tmp_path / "album.unfinished").exists()


def test_progress_is_kept_on_disk_while_it_runs(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill asks nobody: what is done is written about once a minute (here after every batch)."""
    from htc_vlm.cli import compress

    folder, file, lengths = photos(tmp_path / "photos", 4), tmp_path / "album", []
    monkeypatch.setattr(compress, "SAVE_EVERY_S", 0.0)
    real = Answerer.encode

    def encode(self: Answerer, pictures: object, maps: bool = False) -> object:
        lengths.append(len(CompressedImages.load(file)) if file.exists() else 0)
        return real(self, pictures)  # type: ignore[arg-type]

    monkeypatch.setattr(Answerer, "encode", encode)
    assert compressed(capsys, str(folder), "--output", str(file), "--batch-size", "1")[0] == 0
    assert lengths == [0, 1, 2, 3]


def test_a_disk_that_is_too_small_is_told_after_the_first_batch(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk full came after all the work, as a traceback."""
    from htc_vlm.cli import compress

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(compress.shutil, "disk_usage", lambda path: usage)
    file = tmp_path / "album"
    code, out, lines = compressed(capsys, str(photos(tmp_path / "photos", 4)), "--output", str(file), "--batch-size", "2")
    per_picture = tiny.N_LAYERS * 2 * tiny.N_KV_HEADS * tiny.HEAD_DIM * 4
    assert (code, out) == (2, "") and not file.exists()
    assert lines[-1] == f"htc-vlm compress: {file}: 4 pictures need {4 * per_picture:,} bytes, the disk has 1,000"
