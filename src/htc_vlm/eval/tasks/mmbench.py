"""MMBench dev (English): multiple choice, asked once for every rotation of its options.

Source:  Liu et al. 2023; mmbench_dev_20230712.tsv from opencompass; prompt as in LLaVA-1.5 (model_vqa_mmbench.py
         with --single-pred-prompt); reading of the letter and circular rule as in open-compass/VLMEvalKit.
Differs: an answer in which no option can be read by rule is wrong; the official server asks a chat model there.
         At most 128 new tokens (LLaVA allows 1024): a letter needs one.

The file holds the rotations as rows of their own (index + 1000000, + 2000000, ...). A file without them is rotated
here in the same way. `circular=false` scores the unrotated rows alone ("vanilla"), which is always shown too.

Files:   mmbench/mmbench_dev_20230712.tsv, or today's mmbench/MMBench_DEV_EN.tsv (pictures are inside, base64; in the latter a
         short image field is the index of the row that holds the picture); or, below mmbench/, the parquet files of
         lmms-lab/MMBench: en/dev-*.parquet
Prompt:  [<hint>\\n]<question>\\nA. <option>\\nB. ...
         Answer with the option's letter from the given choices directly.
"""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows
from htc_vlm.eval.score import circular_accuracy, option_letter
from htc_vlm.eval.task import TASKS, Item, Mark, lettered_prompt, percent, picture_from

_FILES = ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv")
_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
_LONGEST_INDEX = 64  # VLMEvalKit: an image field of at most so many characters is another row's index
_STEP = 1_000_000


def _is_empty(value: str | None) -> bool:
    """pandas reads an empty field as nan, and some copies of the file were written from there. "None" is an option."""
    return value is None or value.strip().lower() in ("", "nan")


def _decode(base64_picture: str, name: str) -> Image.Image:
    return picture_from(io.BytesIO(base64.b64decode(base64_picture)), name)


@dataclass(frozen=True)
class MmBenchRow:
    """One row of the TSV: `index` counts rotations in millions."""

    index: int
    question: str
    options: dict[str, str]
    answer: str
    category: str
    load: Callable[[], Image.Image]
    n_rows: int = 1  # rows of this question in the file, all of which must be right


def _index(row: MmBenchRow) -> int:
    return row.index


def _rows(path: Path) -> list[MmBenchRow]:
    """The rows of a TSV; ValueError names missing columns, and rows whose picture is in no row."""
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}")
        rows = list(reader)
    pictures = {row["index"]: row["image"] for row in rows}
    return [_row(fields, _loader(path, fields, pictures)) for fields in rows]


def _loader(path: Path, fields: Mapping[str, str], pictures: Mapping[str, str]) -> Callable[[], Image.Image]:
    picture, index = fields["image"] or "", fields["index"]
    if len(picture) <= _LONGEST_INDEX:
        index, picture = picture, pictures.get(picture, "")
    if len(picture) <= _LONGEST_INDEX:
        raise ValueError(f"{path}: row {fields['index']} has no picture, nor has the row {index!r} that it names")
    return partial(_decode, picture, f"{path}, row {index}")


def _row(fields: Mapping[str, Any], load: Callable[[], Image.Image]) -> MmBenchRow:
    options = {letter: fields[letter] for letter in "ABCDE" if not _is_empty(fields.get(letter))}
    if list(options) != list("ABCDE"[: len(options)]):
        raise ValueError(f"MMBench row {fields['index']} has an empty option before a filled one: {options}")
    if fields.get("answer") not in options:
        raise ValueError(f"MMBench row {fields['index']} has no usable answer: {fields.get('answer')!r} of {options}")
    hint = fields.get("hint")
    question = fields["question"] if _is_empty(hint) or str(hint).strip() == "None" else f"{hint}\n{fields['question']}"
    return MmBenchRow(int(fields["index"]), question, options, fields["answer"], fields["category"], load)


def rotations(row: MmBenchRow) -> Iterator[MmBenchRow]:
    """The other rotations of a row: every step moves each option's text one letter up.

    >>> row = MmBenchRow(7, "?", {"A": "cat", "B": "dog"}, "A", "", Image.Image)
    >>> [(turned.index, turned.options, turned.answer) for turned in rotations(row)]
    [(1000007, {'A': 'dog', 'B': 'cat'}, 'B')]
    """
    letters, texts = list(row.options), list(row.options.values())
    for step in range(1, len(letters)):
        turned = dict(zip(letters, texts[step:] + texts[:step], strict=True))
        answer = letters[(letters.index(row.answer) - step) % len(letters)]
        yield MmBenchRow(row.index + step * _STEP, row.question, turned, answer, row.category, row.load)


@TASKS.register("mmbench")
@dataclass(frozen=True)
class MmBench:
    name: ClassVar[str] = "mmbench"
    splits: ClassVar[tuple[str, ...]] = ("dev",)
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "mmbench/mmbench_dev_20230712.tsv or mmbench/MMBench_DEV_EN.tsv, or, below mmbench/, lmms-lab/MMBench's "
        "en/dev-*.parquet"
    )
    circular: bool = True

    def load(self, root: Path, split: str) -> list[Item]:
        rows = self._read(root / "mmbench")
        if all(row.index < _STEP for row in rows):
            rows = [turned for row in rows for turned in (row, *rotations(row))]
        by_question: dict[int, list[MmBenchRow]] = {row.index: [] for row in rows if row.index < _STEP}
        orphans = [row.index for row in rows if row.index % _STEP not in by_question]
        if orphans:
            raise ValueError(f"MMBench: rotations of questions that are not in the file: {orphans[:10]}")
        for row in rows:
            by_question[row.index % _STEP].append(row)
        # The unrotated row comes first: its picture serves all, and a question's rows follow one another.
        return [item for turned in by_question.values() for item in self._items(sorted(turned, key=_index))]

    @staticmethod
    def _read(folder: Path) -> list[MmBenchRow]:
        """One TSV, or the parquet files. ValueError when several TSVs are there: which is meant?"""
        tables = [folder / name for name in _FILES if (folder / name).is_file()]
        if len(tables) > 1:
            raise ValueError(f"{folder} holds {' and '.join(table.name for table in tables)}; leave one there")
        if tables:
            return _rows(tables[0])
        files = hub_files(folder, "dev", ("en",))
        if not files:
            raise FileNotFoundError(f"official file missing: {folder / _FILES[0]}")
        return [_row(row, picture) for row, picture in hub_rows(files, [name for name in _COLUMNS if name != "image"])]

    @staticmethod
    def _items(turned: Sequence[MmBenchRow]) -> Iterator[Item]:
        for row in turned:
            prompt = lettered_prompt(row.question, row.options)
            counted = replace(row, n_rows=len(turned))
            yield Item(str(row.index), str(turned[0].index), turned[0].load, prompt, counted)

    def facts(self, item: Item) -> Facts:
        return Facts(item.reference.question, item.reference.answer, item.reference.options)

    marks_groups: ClassVar[bool] = True

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        """One mark a question: all its rotations right, or (circular=false) the unrotated row."""
        rows: dict[int, list[bool]] = {}
        for item in items:
            if self.circular or item.reference.index < _STEP:
                right = option_letter(answers[item.id], item.reference.options) == item.reference.answer
                rows.setdefault(item.reference.index % _STEP, []).append(right)
        return [Mark(str(index), str(index), all(rights)) for index, rights in rows.items()]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        right = {
            item.reference.index: option_letter(answers[item.id], item.reference.options) == item.reference.answer
            for item in items
        }
        asked = Counter(index % _STEP for index in right)
        cut = [row.index for row in (item.reference for item in items) if asked[row.index % _STEP] != row.n_rows]
        if cut:
            raise ValueError(f"MMBench asks all rotations of a question; --limit cuts {cut}: take some more or less")
        unturned = [is_right for index, is_right in right.items() if index < _STEP]
        shares = {"circular": circular_accuracy(right.items()), "vanilla": sum(unturned) / len(unturned)}
        for category in sorted({item.reference.category for item in items}):
            of_category = [item.reference.index for item in items if item.reference.category == category]
            shares[category] = circular_accuracy((index, right[index]) for index in of_category)
        return percent({"score": shares["circular" if self.circular else "vanilla"]} | shares)
