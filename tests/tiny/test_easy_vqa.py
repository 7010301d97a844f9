"""easy-VQA from tiny files in the official layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from htc_vlm.tiny import easy_vqa

TRAIN = [
    ["What color is the shape?", "red", 1],
    ["Is there a circle?", "yes", 1],
    ["Is there not a red shape in the image?", "no", 10],
    ["What shape is present?", "circle", 20],
]
TEST = [["What shape is in the image?", "circle", 0], ["Is there a blue shape?", "no", 0]]


def forget() -> None:
    for cached in (easy_vqa._official, easy_vqa.images, easy_vqa._by_image):
        cached.cache_clear()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """HTC_VLM_DATA with four training pictures' questions and one test picture's, as the wheel unpacks."""
    data = tmp_path / "easy-vqa" / "easy_vqa" / "data"
    for split, rows in (("train", TRAIN), ("test", TEST)):
        (data / split / "images").mkdir(parents=True)
        (data / split / "questions.json").write_text(json.dumps(rows))
        for number in {row[2] for row in rows}:
            Image.new("RGB", (64, 64), (200, int(number), 0)).save(data / split / "images" / f"{number}.png")
    (data / "answers.txt").write_text("circle\nred\nyes\nno\n")
    monkeypatch.setenv("HTC_VLM_DATA", str(tmp_path))
    forget()
    yield data
    forget()


def test_val_is_cut_from_train_by_picture_and_test_is_the_official_list(root: Path) -> None:
    """Pictures 10 and 20 are val. Prevents a picture in both train and val, and a changed test list."""
    assert list(easy_vqa.images("train")) == ["train/1"]
    assert list(easy_vqa.images("val")) == ["train/10", "train/20"]
    assert [(q.text, q.answer, q.kind, q.image) for q in easy_vqa.questions("test")] == [
        ("what shape is in the image ?", "circle", "open", "test/0"),
        ("is there a blue shape ?", "no", "yes/no", "test/0"),
    ]
    ids = [q.id for split in ("train", "val", "test") for q in easy_vqa.questions(split)]
    assert ids == [f"easy-vqa/train/{i}" for i in range(4)] + ["easy-vqa/test/0", "easy-vqa/test/1"]


def test_pictures_are_the_files(root: Path) -> None:
    """Prevents a test picture for a train id: both have a number 1 in the official files."""
    assert easy_vqa.picture("train/10").getpixel((0, 0)) == (200, 10, 0)
    assert easy_vqa.picture("train/10").mode == "RGB"


def test_sampled_questions_are_the_pictures_own(root: Path) -> None:
    """Prevents asking one picture another's questions; more than there are gives all."""
    assert {(q.text, q.answer) for q in easy_vqa.sample_questions("train/1", 9, seed=0)} == {
        ("what color is the shape ?", "red"),
        ("is there a circle ?", "yes"),
    }
    assert len(easy_vqa.sample_questions("train/1", 1, seed=0)) == 1
    assert easy_vqa.sample_questions("train/1", 2, seed=5) == easy_vqa.sample_questions("train/1", 2, seed=5)


def test_the_vocabulary_holds_every_training_word(root: Path) -> None:
    """Prevents an unknown word in training."""
    known = set(easy_vqa.vocabulary())
    asked = [*easy_vqa.questions("train"), *easy_vqa.questions("val")]
    assert all(set(q.text.split()) | {q.answer} <= known for q in asked)
    assert easy_vqa.vocabulary() == sorted(known)


def test_missing_files_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a bare "no such file" for something that one command installs."""
    monkeypatch.setenv("HTC_VLM_DATA", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install easy-vqa==1\.0"):
        easy_vqa.folder()


def test_a_damaged_question_file_is_named(root: Path) -> None:
    """Prevents training on half a file after a broken download."""
    (root / "test" / "questions.json").write_text('[["What shape')
    with pytest.raises(ValueError, match="questions.json"):
        easy_vqa.questions("test")


def test_an_unknown_split_is_refused(root: Path) -> None:
    """Prevents an empty evaluation."""
    with pytest.raises(ValueError, match="no split 'dev'"):
        easy_vqa.questions("dev")
