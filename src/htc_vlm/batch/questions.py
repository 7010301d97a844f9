"""Reads what is asked: questions for all pictures, or rows of picture and question.

Source:  ours.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
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

    def about(self, ref: Ref, folder: Path) -> list[str]:
        """What is asked about a picture; rows name it as the source does, by its path below the source, or by its file name."""
        if not self.rows:
            return list(self.for_all)
        for name in names_of(ref, folder):
            if name in self.rows:
                return list(self.rows[name])
        return []

    @property
    def digest(self) -> str:
        written = json.dumps([list(self.for_all), {name: list(asked) for name, asked in self.rows.items()}])
        return hashlib.sha256(written.encode()).hexdigest()


def names_of(ref: Ref, folder: Path) -> list[str]:
    """The names by which rows may speak of a picture, the clearest first."""
    names = [ref.name]
    if ref.name.startswith(f"{folder}/"):
        names.append(ref.name[len(str(folder)) + 1 :])
    return [*names, Path(ref.name).name]


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
