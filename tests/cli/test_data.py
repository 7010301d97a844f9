"""`htc-vlm data`: refuses what is not official, writes what LLaVA's reader reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from htc_vlm.cli import data as command
from htc_vlm.data.conversations import load_conversations
from htc_vlm.tiny import easy_vqa, pictograms
from htc_vlm.tiny.questions import Question

ROWS = {
    "train": [
        ["Is there a circle?", "no", 1],
        ["What shape is present?", "circle", 1],
        ["Is there a circle?", "yes", 10],
        ["What shape is present?", "circle", 10],
    ],
    "test": [["Is there a circle?", "no", 0], ["What shape is present?", "circle", 2]],
}


def forget() -> None:
    for cached in (easy_vqa._official, easy_vqa.images, easy_vqa._by_image):
        cached.cache_clear()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for --data with a tiny easy-vqa."""
    data = tmp_path / "easy-vqa" / "easy_vqa" / "data"
    for split, rows in ROWS.items():
        (data / split / "images").mkdir(parents=True)
        (data / split / "questions.json").write_text(json.dumps(rows))
        for row in rows:
            Image.new("RGB", (64, 64), (9, int(row[2]), 9)).save(data / split / "images" / f"{row[2]}.png")
    (data / "answers.txt").write_text("circle\nyes\nno\n")
    monkeypatch.setenv("HTC_VLM_DATA", "set by the test, so that it is restored afterwards")
    forget()
    yield tmp_path
    forget()


def test_files_of_another_size_are_refused(root: Path, tmp_path: Path) -> None:
    """Prevents a score on a truncated copy under the official name; nothing is written."""
    with pytest.raises(ValueError, match="not the official files of easy-vqa"):
        command.run(["easy-vqa", "--data", str(root), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_what_the_conversation_reader_reads(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Picture 10 is val and has two questions. Prevents a written form of our own that trainers cannot read."""
    monkeypatch.setitem(command.OFFICIAL, "easy-vqa", {"train": (2, 4), "test": (2, 2)})
    out = tmp_path / "out"
    assert command.run(["easy-vqa", "--data", str(root), "--out", str(out)]) == 0
    (record,) = load_conversations(out / "val.json", out / "images")
    assert [(turn.question, turn.answer) for turn in record.turns] == [
        ("<image>\nis there a circle ?", "yes"),
        ("what shape is present ?", "circle"),
    ]
    with Image.open(record.images[0]) as picture:
        assert picture.getpixel((0, 0)) == (9, 10, 9)
    assert not list(out.glob("*.part"))
    printed = capsys.readouterr().out
    assert "test: 2 images, 2 questions" in printed and "question only %" in printed


def test_a_missing_picture_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents finding out in the middle of a training run."""
    monkeypatch.setitem(command.OFFICIAL, "easy-vqa", {"train": (2, 4), "test": (2, 2)})
    (root / "easy-vqa" / "easy_vqa" / "data" / "test" / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match="picture test/2"):
        command.run(["easy-vqa", "--data", str(root)])


@pytest.mark.slow
def test_pictograms_are_written_as_they_are_composed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two scenes of each split, 12 questions each. Prevents lossy pictures, and a limit that is not obeyed."""
    assert command.run(["pictograms", "--out", str(tmp_path), "--limit", "2"]) == 0
    for split in ("train", "val", "test", "test-unseen"):
        records = load_conversations(tmp_path / f"{split}.json", tmp_path / "images")
        assert [len(record.turns) for record in records] == [12, 12]
        with Image.open(tmp_path / "images" / split / "1.png") as picture:
            assert (np.asarray(picture) == np.asarray(pictograms.picture(f"{split}/1"))).all()
    assert "bag of things %" in capsys.readouterr().out


def test_a_limit_below_one_is_refused() -> None:
    """Prevents "0 images verified" from looking like success."""
    with pytest.raises(ValueError, match="--limit"):
        command.run(["pictograms", "--limit", "0"])


def test_a_word_outside_the_vocabulary_is_refused() -> None:
    """Prevents a question that the tokenizer turns into <unk>."""
    question = Question("q", "test/0", "is there a unicorn ?", "no", "exist")
    with pytest.raises(ValueError, match="unicorn"):
        command.check_questions(pictograms, [question])


def test_an_id_used_twice_is_refused() -> None:
    """Prevents one answer from being counted for two questions."""
    question = Question("q", "test/0", "is there a cat ?", "no", "exist")
    with pytest.raises(ValueError, match="used twice"):
        command.check_questions(pictograms, [question, question])


def test_a_conversation_file_of_somebodys_own_is_not_replaced(tmp_path: Path) -> None:
    """`--out .` in a project folder wrote over its train.json, and pictures of the same name; writing again changes nothing."""
    asked = pictograms.questions("val")[:1]
    (tmp_path / "val.json").write_text("[]")
    with pytest.raises(ValueError, match=r"val.json: already there with other content; give another folder, or --force"):
        command.write_split(pictograms, asked, tmp_path, "val")
    assert (tmp_path / "val.json").read_text() == "[]"
    written = command.write_split(pictograms, asked, tmp_path, "val", force=True)
    before = written.stat().st_mtime_ns
    assert command.write_split(pictograms, asked, tmp_path, "val").stat().st_mtime_ns == before
    (tmp_path / "images" / f"{asked[0].image}.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"png: already there with other content"):
        command.write_split(pictograms, asked, tmp_path, "val")
