"""Reads what is asked: questions for all pictures, or rows of picture and question.

Source:  ours.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from htc_vlm.batch.sources import Ref
from htc_vlm.files import check_text, read_text

PICTURE, QUESTION = ("picture", "image", "path", "file", "id"), ("question", "text", "prompt")


@dataclass(frozen=True)
class Questions:
    """for_all: asked about each picture. rows: picture -> its own questions."""

    for_all: Sequence[str] = ()
    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def about(
        self, refs: Sequence[Ref], folder: Path, gone: Collection[str] = ()
    ) -> tuple[dict[str, list[str]], dict[str, str]]:
        """(picture -> what is asked about it, name in the rows -> why no one picture has it).

        Rows name a picture as the source does, by its path below `folder`, or by its file name where no other has the same.
        gone: pictures that the source had before, looked at last.
        """
        if not self.rows:
            return {ref.name: list(self.for_all) for ref in refs}, {}
        names = [_names([ref.name for ref in refs], folder), _names(gone, folder)]
        asked: dict[str, list[str]] = {}
        strange = {}
        for written, questions in self.rows.items():
            found = next((some for some in (_find(written, one) for one in names) if some), [])
            if len(found) == 1:
                asked.setdefault(found[0], []).extend(questions)
            elif found:
                some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
                strange[written] = f"{written}: is the name of {len(found)} pictures ({some}); give the path below the source"
            else:
                strange[written] = f"{written}: is not among the pictures of the source"
        return {name: list(dict.fromkeys(questions)) for name, questions in asked.items()}, strange

    @property
    def digest(self) -> str:
        written = json.dumps([list(self.for_all), {name: list(asked) for name, asked in self.rows.items()}])
        return hashlib.sha256(written.encode()).hexdigest()


Names = tuple[dict[str, list[str]], ...]


def _names(pictures: Iterable[str], folder: Path) -> Names:
    """Pictures by each kind of name that rows may use, the clearest first: the whole, below the folder, of the file alone."""
    kinds: Names = ({}, {}, {})
    for name in pictures:
        kinds[0].setdefault(os.path.abspath(name), []).append(name)
        if name.startswith(f"{folder}/"):
            kinds[1].setdefault(name[len(str(folder)) + 1 :], []).append(name)
        elif str(folder) == ".":
            kinds[1].setdefault(name, []).append(name)
        kinds[2].setdefault(os.path.basename(name), []).append(name)
    return kinds


def _find(written: str, kinds: Names) -> list[str]:
    plain = os.path.normpath(written)
    keys = (os.path.abspath(written), plain, plain)
    return next((kind[key] for kind, key in zip(kinds, keys, strict=True) if key in kind), [])


def read(path: Path) -> Questions:
    """.txt: a question a line, for all pictures. .jsonl, .csv, .parquet: rows with a question, and a picture or none at all.

    ValueError names the file and the line of what cannot be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of questions")
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        rows = _json_lines(path)
    elif kind in (".csv", ".tsv"):
        table = io.StringIO(read_text(path), newline="")
        try:
            rows = list(csv.DictReader(table, delimiter="\t" if kind == ".tsv" else ","))
        except csv.Error as error:
            raise ValueError(f"{path}: is no table that can be read ({error})") from error
    elif kind == ".parquet":
        from htc_vlm.store.export import pyarrow

        rows = pyarrow().parquet.read_table(path).to_pylist()
    elif kind == ".txt":
        lines = read_text(path).split("\n")
        rows = [{"question": line.strip()} for line in lines if line.strip()]
    else:
        raise ValueError(f"{path}: is of no known kind; give .txt, .jsonl, .csv, .tsv or .parquet")
    return _sorted_out(path, rows)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: is no JSON ({error})") from error
            rows.append({"question": row} if isinstance(row, str) else row)
    return rows


def _sorted_out(path: Path, rows: Sequence[Mapping[str, Any]]) -> Questions:
    if not rows:
        raise ValueError(f"{path}: has no questions")
    for_all: list[str] = []
    own: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        asked = next((row[key] for key in QUESTION if isinstance(row, Mapping) and row.get(key)), None)
        if not isinstance(asked, str) or not asked.strip():
            raise ValueError(f"{path}, row {number}: has no question (looked for {', '.join(QUESTION)})")
        check_text(asked, f"{path}, row {number}")
        picture = next((row[key] for key in PICTURE if row.get(key)), None)
        if picture is None:
            for_all.append(asked)
        else:
            own.setdefault(str(picture), []).append(asked)
    if for_all and own:
        raise ValueError(
            f"{path}: some rows name a picture and some do not; give questions for all pictures, or a picture in each row"
        )
    return Questions(list(dict.fromkeys(for_all)), {name: list(dict.fromkeys(asked)) for name, asked in own.items()})
