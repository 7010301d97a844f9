"""The miniatures of official directories, rewritten as the parquet files of lmms-lab's copies on the hub.

Columns, folders and file names as there; pictures as {"bytes", "path"}; two rows a row group, so that groups matter.
"""

from __future__ import annotations

import base64
import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def _picture(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def gqa(folder: Path, out: Path) -> None:
    questions = _json(folder / "testdev_balanced_questions.json")
    kept = ("imageId", "question", "answer", "types")
    rows = [{"id": key, **{name: entry[name] for name in kept}} for key, entry in questions.items()]
    _write(out / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    pictures = [{"id": path.stem, "image": _picture(path)} for path in sorted((folder / "images").iterdir())]
    _write(out / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", pictures)


def vqav2(folder: Path, out: Path) -> None:
    asked = _json(folder / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    known = {entry["question_id"]: entry for entry in _json(folder / "v2_mscoco_val2014_annotations.json")["annotations"]}
    for split, pictures, n in (("validation", "val2014/COCO_val2014", len(asked)), ("testdev", "test2015/COCO_test2015", 5)):
        rows = [
            {**known[entry["question_id"]], **entry, "image": _picture(folder / f"{pictures}_{entry['image_id']:012d}.jpg")}
            for entry in asked[:n]
        ]
        if split == "testdev":
            rows = [row | {"answers": None, "answer_type": None} for row in rows]
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            _write(out / "data" / f"{split}-0000{number}-of-00002.parquet", part)


def mmbench(folder: Path, out: Path) -> None:
    csv.field_size_limit(sys.maxsize)
    with (folder / "mmbench_dev_20230712.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        row["image"] = {"bytes": base64.b64decode(row["image"]), "path": None}  # type: ignore[assignment]
        row |= {name: row[name] or "nan" for name in ("hint", "A", "B", "C", "D")}  # written from pandas
    _write(out / "en" / "dev-00000-of-00001.parquet", [{**row, "index": int(row["index"])} for row in rows])
    _write(out / "cn" / "dev-00000-of-00001.parquet", [{**row, "index": int(row["index"]), "question": "?"} for row in rows])


def mme(folder: Path, out: Path) -> None:
    rows = []
    for text in sorted(folder.rglob("*.txt"), reverse=True):  # the hub's order is not the folders'
        release = folder / "MME_Benchmark_release_version"
        subtask = text.relative_to(release).parts[0]
        [picture] = [path for path in (release / subtask).rglob(f"{text.stem}.*") if path.suffix != ".txt"]
        for line in text.read_text().splitlines():
            question, answer = line.split("\t")
            rows.append({"question_id": f"{subtask}/{picture.name}", "image": _picture(picture), "question": question,
                         "answer": answer, "category": subtask})  # fmt: skip
    _write(out / "data" / "test-00000-of-00001.parquet", rows)


def pope(folder: Path, out: Path) -> None:
    rows: list[dict[str, Any]] = []
    for category in ("adversarial", "popular", "random"):
        for line in (folder / "coco" / f"coco_pope_{category}.json").read_text().splitlines():
            entry = json.loads(line)
            rows.append({"id": str(len(rows)), "question_id": str(entry["question_id"]), "question": entry["text"],
                         "answer": entry["label"], "image_source": entry["image"].removesuffix(".jpg"),
                         "image": _picture(folder / "val2014" / entry["image"]), "category": category})  # fmt: skip
    _write(out / "data" / "test-00000-of-00001.parquet", rows)


def seedbench(folder: Path, out: Path) -> None:
    rows = []
    for entry in _json(folder / "SEED-Bench.json")["questions"]:
        if entry["data_type"] == "image":
            frames = [folder / "SEED-Bench-image" / entry["data_id"]]
        else:  # several frames; LLaVA shows the middle one
            frames = [folder / "SEED-Bench-video-image" / f"{entry['question_id']}.png"] * 3
        rows.append({**entry, "image": [_picture(frame) for frame in frames], "segment": None})
    _write(out / "data" / "test-00000-of-00001.parquet", rows)


def scienceqa(folder: Path, out: Path) -> None:
    rows = []
    for pid, problem in _json(folder / "problems.json").items():
        picture = folder / "images" / "test" / pid / "image.png"
        rows.append({**problem, "image": _picture(picture) if picture.is_file() else None})
    _write(out / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows)
    _write(out / "ScienceQA-IMG" / "test-00000-of-00001.parquet", [row for row in rows if row["image"]])


def textvqa(folder: Path, out: Path) -> None:
    entries = _json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    read = {entry["image_id"]: entry["ocr_tokens"] for entry in entries}
    pictures = folder / "train_images"
    rows = [
        {**entry, "ocr_tokens": read[entry["image_id"]], "image": _picture(pictures / f"{entry['image_id']}.jpg")}
        for entry in _json(folder / "TextVQA_0.5.1_val.json")["data"]
    ]
    _write(out / "data" / "validation-00000-of-00001.parquet", rows)


def mmvet(folder: Path, out: Path) -> None:
    rows = [
        {"question_id": key, "image": _picture(folder / "images" / entry["imagename"]), "question": entry["question"]}
        for key, entry in _json(folder / "mm-vet.json").items()
    ]
    _write(out / "data" / "test-00000-of-00001.parquet", rows)


def to_hub(name: str, root: Path) -> None:
    """Replace the official files of a benchmark below `root` by parquet files."""
    folder = root / {"seedbench": "seed_bench", "mmvet": "mm-vet"}.get(name, name)
    rewrite: Callable[[Path, Path], None] = globals()[name]
    rewrite(folder, root / "hub")
    shutil.rmtree(folder)
    (root / "hub").rename(folder)
