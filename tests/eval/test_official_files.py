"""Official files as they come: marks of other editors, pictures that are damaged or missing, today's layouts."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from htc_vlm.data.images import ImageError
from htc_vlm.eval.run import run_task
from htc_vlm.eval.task import make_task

from . import miniatures
from .conftest import FakeAnswerer

MINIATURES = ("gqa", "vqav2", "mme", "pope", "seedbench", "scienceqa", "textvqa", "mmvet")


def _loaded(name: str, root: Path) -> list[Any]:
    task = make_task(name)
    return task.load(root, task.splits[0])


@pytest.mark.parametrize("name", (*MINIATURES, "mmbench"))
def test_a_byte_order_mark_changes_nothing(name: str, tmp_path: Path) -> None:
    """Files saved by Windows editors begin with one; json.loads refuses it, and csv reads it into the first column."""
    vars(miniatures)[name](tmp_path)
    before = [(item.id, item.prompt) for item in _loaded(name, tmp_path)]
    texts = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".txt", ".tsv")]
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts and [(item.id, item.prompt) for item in _loaded(name, tmp_path)] == before


@pytest.mark.parametrize("name", ("pope", "mme"))
def test_only_newlines_end_a_line(name: str, tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in a question; splitlines cuts there."""
    vars(miniatures)[name](tmp_path)
    n_items = len(_loaded(name, tmp_path))
    for path in [*tmp_path.rglob("coco_pope_*.json"), *tmp_path.rglob("*.txt")]:
        path.write_text(path.read_text().replace("Is ", "Is\u2028\u0085 "), encoding="utf-8")
    items = _loaded(name, tmp_path)
    assert len(items) == n_items and items[0].prompt.startswith("Is\u2028\u0085 ")


def test_damaged_text_names_file_and_line(tmp_path: Path) -> None:
    """`Expecting value: line 1 column 1` of a nameless file helps nobody."""
    miniatures.pope(tmp_path)
    path = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"yes"', "yes", 1))
    with pytest.raises(ValueError, match=r"coco_pope_random\.json, line 1: is not JSON"):
        _loaded("pope", tmp_path)
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    with pytest.raises(ValueError, match=r"coco_pope_random\.json: is not UTF-8"):
        _loaded("pope", tmp_path)
    miniatures.gqa(tmp_path)
    (tmp_path / "gqa" / "testdev_balanced_questions.json").write_text('{\n"1": {')
    with pytest.raises(ValueError, match=r"testdev_balanced_questions\.json, line 2: is not JSON"):
        _loaded("gqa", tmp_path)


def test_a_part_without_questions_is_named(tmp_path: Path) -> None:
    """The score was of thirteen subtasks, or two settings."""
    miniatures.mme(tmp_path)
    (tmp_path / "mme" / "MME_Benchmark_release_version" / "OCR" / "0000.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"MME subtask without questions: no .txt in .*OCR"):
        _loaded("mme", tmp_path)
    miniatures.pope(tmp_path)
    (tmp_path / "pope" / "coco" / "coco_pope_popular.json").write_text("")
    with pytest.raises(ValueError, match=r"coco_pope_popular.json: holds no questions"):
        _loaded("pope", tmp_path)


def _half(path: Path) -> None:
    """A larger picture in the same place, its second half cut off."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(data, "PNG" if path.suffix == ".png" else "JPEG")
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])


def _pictures(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png") or "SEED-Bench-image" in str(path.parent))


@pytest.mark.parametrize("name", MINIATURES)
def test_a_truncated_picture_is_named_with_its_question(name: str, tmp_path: Path) -> None:
    """`image file is truncated (2 bytes not processed)`: of which of 4,500?"""
    vars(miniatures)[name](tmp_path)
    for path in _pictures(tmp_path):
        _half(path)
    with pytest.raises(ImageError, match=rf"{tmp_path}.*: is damaged, truncated or no picture .* \(question .+\)"):
        run_task(FakeAnswerer(), name, tmp_path / "out", root=tmp_path)


@pytest.mark.parametrize("name", MINIATURES)
def test_missing_pictures_are_told_before_anything_is_asked(name: str, tmp_path: Path) -> None:
    """After hours of answering, the 4,000th picture turns out not to be there."""
    vars(miniatures)[name](tmp_path)
    *_, last = _pictures(tmp_path)
    if name == "seedbench":
        last = tmp_path / "seed_bench" / "SEED-Bench-image" / "4_77"
    last.rename(tmp_path / "gone")
    fake = FakeAnswerer()
    with pytest.raises(FileNotFoundError, match="missing: .*|needs one picture"):
        run_task(fake, name, tmp_path / "out", root=tmp_path)
    assert fake.asked == []


def _table(root: Path, rows: list[dict[str, Any]], name: str = "MMBench_DEV_EN.tsv") -> None:
    (root / "mmbench").mkdir(parents=True, exist_ok=True)
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
    with (root / "mmbench" / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def _row(index: int, image: str, **fields: str) -> dict[str, Any]:
    row = {"index": index, "question": "How many?", "A": "Five", "B": "One", "answer": "A", "category": "c", "image": image}
    return row | fields


def _png(colour: str) -> str:
    data = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_todays_mmbench_names_rows_instead_of_repeating_pictures(tmp_path: Path) -> None:
    """MMBench_DEV_EN.tsv: rotations, and other questions about the picture, hold the index of the row with the picture."""
    _table(tmp_path, [_row(3, _png("red")), _row(1_000_003, "3", A="One", B="Five", answer="B"), _row(5, "3")])
    items = _loaded("mmbench", tmp_path)
    assert [item.id for item in items] == ["3", "1000003", "5"]
    assert [item.load().getpixel((0, 0)) for item in items] == [(255, 0, 0)] * 3
    _table(tmp_path, [_row(3, "7")])
    with pytest.raises(ValueError, match="row 3 has no picture, nor has the row '7' that it names"):
        _loaded("mmbench", tmp_path)


def test_an_option_called_none_is_an_option(tmp_path: Path) -> None:
    """"None" of four options took itself and all after it away; only an empty field ends them."""
    _table(tmp_path, [_row(1, _png("red"), C="None"), _row(2, _png("red"), A="None", answer="B")])
    items = _loaded("mmbench", tmp_path)
    assert [item.id for item in items] == ["1", "1000001", "2000001", "2", "1000002"]
    assert "\nC. None\n" in items[0].prompt and "\nA. None\n" in items[3].prompt
    _table(tmp_path, [_row(1, _png("red"), B="", C="Two")])
    with pytest.raises(ValueError, match="row 1 has an empty option before a filled one"):
        _loaded("mmbench", tmp_path)


def test_mmbench_columns_and_tables_are_checked(tmp_path: Path) -> None:
    """A file saved with commas, and two files of which one would be chosen silently."""
    _table(tmp_path, [_row(1, _png("red"))])
    path = tmp_path / "mmbench" / "MMBench_DEV_EN.tsv"
    text = path.read_text()
    path.write_text(text.replace("\t", ","))
    with pytest.raises(ValueError, match="has no column index, question"):
        _loaded("mmbench", tmp_path)
    path.write_text(text)
    _table(tmp_path, [_row(1, _png("red"))], "mmbench_dev_20230712.tsv")
    with pytest.raises(ValueError, match=r"holds mmbench_dev_20230712\.tsv and MMBench_DEV_EN\.tsv; leave one"):
        _loaded("mmbench", tmp_path)


@pytest.mark.parametrize("name", (*MINIATURES, "mmbench"))
def test_a_missing_file_shows_both_layouts(name: str, tmp_path: Path) -> None:
    """"official file missing" alone sends people to the source code."""
    with pytest.raises(FileNotFoundError, match=rf"missing: .*Task {name} reads, below {tmp_path}: .* lmms-lab/.*\.parquet"):
        run_task(FakeAnswerer(), name, tmp_path / "out", root=tmp_path)


def test_json_lines_keep_their_last_line(tmp_path: Path) -> None:
    """Windows line ends, and no newline at the end."""
    miniatures.pope(tmp_path)
    path = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    n_items = len(_loaded("pope", tmp_path))
    path.write_bytes(path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n"))
    items = _loaded("pope", tmp_path)
    assert len(items) == n_items and not any("\r" in json.dumps([item.id, item.image, item.prompt]) for item in items)
