"""What a batch run has done: rows committed with their answers, so that a killed run goes on and every row is there once.

Source:  ours.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from htc_vlm.files import replacing

FILE = "answers.sqlite"
FORMATS = ("jsonl", "parquet")
ANSWERS = tuple(f"answers.{kind}" for kind in FORMATS)
WRITTEN = ("path", "id", "question", "answer", "error")  # the columns of the answers
COLUMNS = "place, number, path, id, question, answer, error"
TABLES = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (place INTEGER NOT NULL, number INTEGER NOT NULL, path TEXT NOT NULL, id TEXT NOT NULL,
    question TEXT NOT NULL, answer TEXT NOT NULL, error TEXT NOT NULL, PRIMARY KEY (path, number));
CREATE TABLE IF NOT EXISTS pictures (path TEXT PRIMARY KEY, stamp TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Kept:
    """What a journal has of one picture. stamp: of its file when it was read ("": written before there was one)."""

    id: str
    questions: tuple[str, ...]
    stamp: str
    has_error: bool


def check_folder(folder: Path) -> None:
    """ValueError where a folder holds answers that no batch run wrote: they would be replaced."""
    foreign = [name for name in ANSWERS if (folder / name).exists() and not (folder / FILE).exists()]
    if foreign:
        raise ValueError(
            f"{folder / foreign[0]}: already there, and of no batch run (no {FILE} beside it); it would be replaced: give "
            "another --output"
        )


class Journal:
    """The rows of one output folder. Use it in a `with` block: one run at a time may write to a folder."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """about: what must be the same when the run goes on. ValueError where it is not, another run is at work, or the folder
        holds answers that no batch run wrote."""
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock: IO[str] = (folder / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"{folder}: another batch run is writing here; wait for it, or give another --output") from error
        self._db = sqlite3.connect(folder / FILE, isolation_level=None, timeout=60)
        try:
            with self._speaking():
                self._db.text_factory = lambda text: text.decode("utf-8", "replace")  # a flipped bit may make anything of it
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(TABLES)
                if "checksum" not in [column[1] for column in self._db.execute("PRAGMA table_info(answers)")]:
                    self._db.execute("ALTER TABLE answers ADD COLUMN checksum TEXT")  # None: written before there was one
                self._check(about)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """SQLite's errors as what is wrong with the file, in one line."""
        try:
            yield
        except sqlite3.Error as error:
            path, text = str(self.folder / FILE), str(error)
            if "full" in text:
                raise OSError(errno.ENOSPC, "the disk is full; rows written before are kept", path) from error
            if "readonly" in text or "unable to open" in text:
                raise OSError(errno.EROFS, "cannot be written to (read-only)", path) from error
            if "locked" in text or "disk I/O" in text:
                raise OSError(errno.EIO, f"cannot be read or written ({text})", path) from error
            raise ValueError(
                f"{path}: is damaged, or of no batch run ({text}); move it and the answers beside it away and start again: "
                "pictures in the store are not compressed twice"
            ) from error

    def _check(self, about: Mapping[str, Any]) -> None:
        before = {key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM about")}
        differ = [key for key in about if key in before and before[key] != json.loads(json.dumps(about[key]))]
        if differ:
            was = f" (it was {before['source']})" if differ == ["source"] else ""
            raise ValueError(f"{self.folder}: was begun with other {', '.join(differ)}{was}; give another --output")
        values = [(key, json.dumps(value)) for key, value in about.items()]
        self._db.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", values)

    def kept(self) -> dict[str, Kept]:
        """Picture -> what is there of it; all its rows are, since they are committed together. Pictures with a damaged row are
        taken out, and so asked again: SQLite gives flipped bytes without a word."""
        with self._speaking():
            records = self._db.execute(f"SELECT rowid, {COLUMNS}, checksum FROM answers")
            broken = [(rowid, row[2], row[0], row[3]) for rowid, *row in records if not _holds(row)]
            where = "rowid = ? OR path = ? OR (place = ? AND id = ?)"  # of the same picture, if its path is what is damaged
            self._db.executemany(f"DELETE FROM answers WHERE {where}", broken)
            stamps = dict(self._db.execute("SELECT path, stamp FROM pictures"))
            found = self._db.execute("SELECT path, id, question, error FROM answers ORDER BY path, number")
            same: dict[Any, Any] = {}  # one copy in memory of what many pictures are asked
            kept = {}
            for path, rows in itertools.groupby(found, key=lambda row: row[0]):
                mine = list(rows)
                questions = tuple(same.setdefault(question, question) for _, _, question, _ in mine)
                has_error = any(error for *_, error in mine)
                kept[path] = Kept(mine[0][1], same.setdefault(questions, questions), stamps.get(path, ""), has_error)
            return kept

    def drop(self, paths: Iterable[str]) -> None:
        """Take the rows of some pictures out."""
        with self._speaking():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM answers WHERE path = ?", [(path,) for path in paths])
            self._db.execute("COMMIT")

    def stamp(self, stamps: Mapping[str, str]) -> None:
        """Remember what pictures' files looked like."""
        with self._speaking():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?)", stamps.items())
            self._db.execute("COMMIT")

    def add(
        self, rows: Mapping[str, Sequence[Any]], places: Mapping[str, int], stamps: Mapping[str, str] | None = None
    ) -> None:
        """Commit all rows of some pictures, in place of those there; places: each picture's number in the source."""
        values = [
            (places[str(path)], int(number), str(path), str(id), str(question), str(answer), str(error))
            for path, id, number, question, answer, error in zip(
                *(rows[key] for key in ("path", "id", "number", "question", "answer", "error")), strict=True
            )
        ]
        with self._speaking():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                paths = dict.fromkeys(row[2] for row in values)
                self._db.executemany("DELETE FROM answers WHERE path = ?", [(path,) for path in paths])
                insert = f"INSERT INTO answers ({COLUMNS}, checksum) VALUES (?,?,?,?,?,?,?,?)"
                self._db.executemany(insert, [(*row, _checksum(row)) for row in values])
                said = [(path, (stamps or {}).get(path, "")) for path in paths]
                self._db.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?)", said)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def counts(self) -> dict[str, int]:
        """rows, pictures, and refused pictures."""
        row = self._db.execute(
            "SELECT count(*), count(DISTINCT path), count(DISTINCT CASE WHEN error != '' THEN path END) FROM answers"
        ).fetchone()
        return dict(zip(("rows", "pictures", "refused"), row, strict=True))

    def reasons(self, limit: int) -> list[str]:
        """Why pictures could not be read, in the source's order."""
        select = "SELECT error FROM answers WHERE error != '' GROUP BY path ORDER BY min(place) LIMIT ?"
        return [error for (error,) in self._db.execute(select, (limit,))]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in the source's order."""
        for path, id, question, answer, error in self._db.execute(
            f"SELECT {', '.join(WRITTEN)} FROM answers ORDER BY place, path, number"
        ):
            said = {"answer": None if error else answer, "error": error or None}
            yield {"path": path, "id": id or None, "question": question, **said}

    def write(self, kind: str) -> Path:
        """All rows as answers.jsonl or answers.parquet: path, id, question, answer, error."""
        path = self.folder / f"answers.{kind}"
        with self._speaking(), replacing(path) as partial:
            if kind == "jsonl":
                with partial.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
            else:
                _write_parquet(partial, self.rows())
        return path

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _checksum(row: Sequence[Any]) -> str:
    """Of one row's COLUMNS."""
    return hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()[:32]


def _holds(record: Sequence[Any]) -> bool:
    """Are a record's COLUMNS those that its checksum, behind them, was made of?"""
    *row, checksum = record
    return checksum is None or (all(isinstance(one, str | int) for one in row) and checksum == _checksum(row))


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    from htc_vlm.store.export import pyarrow

    arrow = pyarrow()
    schema = arrow.schema([(name, arrow.string()) for name in WRITTEN])
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        given = iter(rows)
        while some := list(itertools.islice(given, 10_000)):
            writer.write_table(arrow.Table.from_pylist(some, schema=schema))
