"""Fashion-MNIST from tiny files in the official idx format."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from htc_vlm.tiny import fashion_mnist

TRAIN_LABELS = [0, 5, 9, 8]
TEST_LABELS = [1, 7]


def write_idx(folder: Path, name: str, labels: list[int]) -> None:
    """Pictures (grey = 10 x their number) and labels, big-endian headers as in the paper's files."""
    pixels = b"".join(bytes([10 * i]) * 784 for i in range(len(labels)))
    header = struct.pack(">IIII", 2051, len(labels), 28, 28)
    (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels))
    (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">II", 2049, len(labels)) + bytes(labels))
    )


def forget() -> None:
    fashion_mnist._official.cache_clear()
    fashion_mnist.images.cache_clear()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """HTC_VLM_DATA with four training and two test pictures, the last training picture being val."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    write_idx(folder, "train", TRAIN_LABELS)
    write_idx(folder, "t10k", TEST_LABELS)
    monkeypatch.setenv("HTC_VLM_DATA", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "nothing")
    monkeypatch.setattr(fashion_mnist, "N_VAL", 1)
    forget()
    yield folder
    forget()


def test_splits_are_the_official_ones_with_val_at_the_end_of_train(root: Path) -> None:
    """Prevents test pictures in training."""
    assert list(fashion_mnist.images("train")) == ["train/0", "train/1", "train/2"]
    assert list(fashion_mnist.images("val")) == ["train/3"]
    assert list(fashion_mnist.images("test")) == ["t10k/0", "t10k/1"]


def test_the_open_question_has_the_labels_name(root: Path) -> None:
    """Labels 0, 5, 9 are T-shirt, sandal, ankle boot. Prevents names that are shifted by one."""
    asked = [q for q in fashion_mnist.questions("train") if q.kind == "open"]
    assert [q.answer for q in asked] == ["tshirt", "sandal", "boot"]
    assert {q.text for q in asked} == {"what item of clothing is this ?"}
    assert [q.answer for q in fashion_mnist.questions("test") if q.kind == "open"] == ["trouser", "sneaker"]


def test_a_yes_no_question_is_right_about_its_picture(root: Path) -> None:
    """Prevents "is this a bag ?" with yes for a boot."""
    names = dict(zip(("train/0", "train/1", "train/2"), ("tshirt", "sandal", "boot"), strict=True))
    asked = [q for seed in range(30) for image in names for q in fashion_mnist.sample_questions(image, 4, seed)]
    yes_no = [q for q in asked if q.kind == "yes/no"]
    assert {q.answer for q in yes_no} == {"yes", "no"}
    assert all((q.text.split()[3] == names[q.image]) == (q.answer == "yes") for q in yes_no)


def test_as_many_questions_are_answered_yes_as_no(root: Path) -> None:
    """One text of ten is answered yes. Asked once each, nine of ten answers were no; within four standard errors of half."""
    asked = [q for seed in range(20) for q in fashion_mnist.sample_questions("train/0", 31, seed)]
    yes_no = [q.answer for q in asked if q.kind == "yes/no"]
    assert len(yes_no) == 600 and abs(yes_no.count("yes") - 300) < 4 * (600 / 4) ** 0.5
    assert len({q.id for q in asked}) == len(asked)


def test_pictures_are_read_in_order(root: Path) -> None:
    """Prevents a header read as pixels."""
    picture = fashion_mnist.picture("train/2")
    assert picture.size == (28, 28) and picture.mode == "RGB"
    assert picture.getextrema() == ((20, 20),) * 3


def test_the_vocabulary_is_closed_and_names_are_one_word(root: Path) -> None:
    """Prevents an answer that the tokenizer cannot say."""
    known = set(fashion_mnist.vocabulary())
    asked = [q for split in ("train", "val", "test") for q in fashion_mnist.questions(split)]
    assert all(set(q.text.split()) | {q.answer} <= known for q in asked)
    assert len(set(fashion_mnist.NAMES)) == 10


def test_missing_files_name_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a message that does not say what to install."""
    monkeypatch.setenv("HTC_VLM_DATA", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "SYSTEM", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        fashion_mnist.folder()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "damaged"),
        (lambda raw: gzip.compress(b"not idx" * 200), "not an official idx file"),
    ],
)
def test_a_damaged_file_is_named(root: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    """Prevents noise as pictures after a broken download."""
    file = root / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as refusal:
        fashion_mnist.questions("test")
    assert file.name in str(refusal.value)


def test_pictures_and_labels_must_be_equally_many(root: Path) -> None:
    """Prevents labels of other pictures."""
    write_idx(root, "t10k", [1, 7, 3])
    pictures = (root / "t10k-images-idx3-ubyte.gz").read_bytes()
    write_idx(root, "t10k", [1, 7])
    (root / "t10k-images-idx3-ubyte.gz").write_bytes(pictures)
    with pytest.raises(ValueError, match="3 pictures and 2 labels"):
        fashion_mnist.images("test")
