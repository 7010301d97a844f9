"""Sixteen SQLite files of rows with a checksum each: what a store keeps, without knowing what the bytes mean.

Source:  sqlite.org/wal.html; LMCache 4086 and SGLang 2151 for what an unchecked or shortened key does: another's answer.
Differs: SQLite returns flipped bytes without a word, and its integrity_check says "ok": each row and each name carries a
         checksum of its own, looked at whenever it is read.

Rows go by the first hex digit of their id, so that up to sixteen processes write at once. `shard_files.py` opens the files.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from htc_vlm.store.rows import (
    COLUMNS,
    PUT_IMAGE,
    PUT_NAME,
    DamagedImageError,
    Row,
    UnknownImageError,
    is_key,
    name_as_given,
    name_as_stored,
)
from htc_vlm.store.shard_files import ShardFiles, is_operational

N_SHARDS = 16
COMMIT_ROWS = 32
READ_AT_ONCE = 256  # rows of one SELECT; SQLite's limit of variables is far above


class Shards(ShardFiles):
    """The files of one store. key: part of every checksum, the recipe's digest."""

    def __init__(self, folder: Path, key: bytes, read_only: bool = False) -> None:
        super().__init__(folder, read_only)
        self.key = key

    # ---------------------------------------------------------------------------------------------------------- writing
    def write(
        self, rows: Sequence[Row], names: Sequence[tuple[str, bytes]] = (), given: Mapping[str, float] | None = None
    ) -> None:
        """Put rows and names in, in commits of at most 32 rows: what is in when this returns stays, whatever happens next.
        A row that is there already is replaced; a name goes to the last image it is given to. given: when each name was
        (default: now). OSError: the disk is full or read-only."""
        names = list(dict(names).items())
        stale = self._elsewhere(names) if names else {}
        for shard in range(N_SHARDS):
            mine = [row for row in rows if _shard_of(row.id) == shard]
            named = self._name_values([(name, id) for name, id in names if _shard_of(id) == shard], given or {})
            chunks = [mine[start : start + COMMIT_ROWS] for start in range(0, len(mine), COMMIT_ROWS)]
            for chunk in chunks or ([[]] if named else []):
                values = [self._values(row) for row in chunk]
                self._commit(shard, [(PUT_IMAGE, values), (PUT_NAME, named if chunk == (chunks or [[]])[-1] else [])])
        for shard, old in stale.items():  # after the new ones: a name is never without its image
            self._commit(shard, [("DELETE FROM names WHERE name = ?", [(name_as_stored(name),) for name in old])])

    def remove(self, ids: Iterable[bytes]) -> int:
        """Take rows and all their names out; how many there were."""
        gone, wanted = 0, list(dict.fromkeys(ids))
        for shard in range(N_SHARDS):
            mine = [(id,) for id in wanted if _shard_of(id) == shard]
            if mine and self._connect(shard, create=False) is not None:
                statements = [("DELETE FROM names WHERE id = ?", mine), ("DELETE FROM images WHERE id = ?", mine)]
                gone += self._commit(shard, statements)
        return gone

    def compact(self) -> None:
        """Give the room of removed rows back to the disk."""
        for shard in range(N_SHARDS):
            with self._speaking(shard):
                if self._connect(shard, create=False) is not None:
                    db = self._connect(shard, create=True)
                    assert db is not None
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    db.execute("VACUUM")
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # ---------------------------------------------------------------------------------------------------------- reading
    def read(self, ids: Sequence[bytes]) -> dict[bytes, Row]:
        """Rows by id, each checked. UnknownImageError, DamagedImageError."""
        found: dict[bytes, Row] = {}
        for id, row in self._read(ids):
            if row is None:
                raise DamagedImageError(
                    f"{self.folder}: image {id.hex()} is damaged (its bytes are not those that were written); "
                    "add its picture again, or remove it"
                )
            found[id] = row
        missing = [id for id in ids if id not in found]
        if missing:
            raise UnknownImageError(f"{self.folder}: no image {missing[0].hex()}; `htc-vlm store list` shows what there is")
        return found

    def intact(self, ids: Sequence[bytes], with_map: bool = False) -> set[bytes]:
        """Those of `ids` that are there and undamaged; with_map: and have a map."""
        return {id for id, row in self._read(ids) if row is not None and (row.seen or not with_map)}

    def _read(self, ids: Sequence[bytes]) -> Iterator[tuple[bytes, Row | None]]:
        """(id, row) of those that are there; None for a damaged row."""
        wanted = list(dict.fromkeys(ids))
        for shard in range(N_SHARDS):
            mine = [id for id in wanted if _shard_of(id) == shard]
            db = self._connect(shard, create=False) if mine else None
            for start in range(0, len(mine) if db is not None else 0, READ_AT_ONCE):
                chunk = mine[start : start + READ_AT_ONCE]
                marks = ",".join("?" * len(chunk))
                try:
                    assert db is not None
                    records = db.execute(f"SELECT {COLUMNS} FROM images WHERE id IN ({marks})", chunk).fetchall()
                except sqlite3.DatabaseError as error:
                    if is_operational(error):
                        raise self._told(error, shard) from error
                    records = [record for id in chunk for record in self._one(shard, id)]
                for record in records:
                    yield bytes(record[0]), self._checked(record)

    def _one(self, shard: int, id: bytes) -> list[tuple]:
        """The record of one id where reading several met a malformed page; its checksum will not hold if it is hit itself."""
        db = self._connect(shard, create=False)
        try:
            return [] if db is None else db.execute(f"SELECT {COLUMNS} FROM images WHERE id = ?", (id,)).fetchall()
        except sqlite3.DatabaseError:
            return [(id, 0.0, 0, 0, b"", b"", b"")]

    def find(self, name: str) -> bytes:
        """The id of a name. UnknownImageError; DamagedImageError where what the name says does not match its checksum."""
        found: list[tuple[float, bytes]] = []
        for shard in range(N_SHARDS):
            select = "SELECT name, id, checksum, added FROM names WHERE name = ?"
            for record in self.select(shard, select, (name_as_stored(name),)):
                if not self._name_holds(record):
                    raise DamagedImageError(f"{self.folder}: the name {name!r} is damaged; add its picture again")
                found.append((record[3], record[1]))
        if not found:
            raise UnknownImageError(f"{self.folder}: no image named {name!r}; `htc-vlm store list` shows what there is")
        return max(found)[1]

    def select(self, shard: int, text: str, values: Sequence[Any] = ()) -> list[tuple]:
        """What a SELECT finds in one shard; nothing where there is no such file. OSError, DamagedImageError."""
        with self._speaking(shard):
            db = self._connect(shard, create=False)
            return [] if db is None else db.execute(text, values).fetchall()

    def ids(self) -> Iterator[bytes]:
        """All ids, shard by shard; without holding a transaction open."""
        for shard in range(N_SHARDS):
            after = 0
            select = "SELECT rowid, id FROM images WHERE rowid > ? ORDER BY rowid LIMIT ?"
            while records := self.select(shard, select, (after, READ_AT_ONCE)):
                yield from (id for _, id in records if is_key(id))  # a damaged one is `damaged`'s
                after = records[-1][0]

    def names(self, ids: Sequence[bytes]) -> dict[bytes, list[str]]:
        """The names of images, in the order they were given."""
        return {id: [name for name, _ in self.names_given(id)] for id in ids}

    def names_given(self, id: bytes) -> list[tuple[str, float]]:
        """The names of one image and when each was given, in this order."""
        select = "SELECT name, id, checksum, added FROM names WHERE id = ? ORDER BY added, name"
        records = self.select(_shard_of(id), select, (id,))
        return [(name_as_given(record[0]), record[3]) for record in records if self._name_holds(record)]

    def last_given(self, names: Sequence[str]) -> dict[str, float]:
        """When each name was given last; of those that are there."""
        found: dict[str, float] = {}
        for start in range(0, len(names), READ_AT_ONCE):
            chunk = [name_as_stored(name) for name in names[start : start + READ_AT_ONCE]]
            select = f"SELECT name, id, checksum, added FROM names WHERE name IN ({','.join('?' * len(chunk))})"
            records = [record for shard in range(N_SHARDS) for record in self.select(shard, select, chunk)]
            for name, added in [(name_as_given(one[0]), one[3]) for one in records if self._name_holds(one)]:
                found[name] = max(added, found.get(name, added))
        return found

    def __len__(self) -> int:
        counts = [self.select(shard, "SELECT count(*) FROM images") for shard in range(N_SHARDS)]
        return sum(found[0][0] for found in counts if found)

    # --------------------------------------------------------------------------------------------------------- checking
    def damaged(self) -> Iterator[tuple[int, list[bytes]]]:
        """(rows looked at, ids of damaged images), shard by shard, in steps: every row and every name is read.

        OSError for a shard whose file cannot be read at all, naming it.
        """
        for shard in range(N_SHARDS):
            db = self._connect(shard, create=False)
            if db is None:
                continue
            indexed, rowids = self._walk(shard, db)
            for start in range(0, len(rowids), READ_AT_ONCE):
                chunk = rowids[start : start + READ_AT_ONCE]
                wrong = [self._look_at(db, rowid, indexed.get(rowid), shard) for rowid in chunk]
                yield len(chunk), [id for id in wrong if id is not None]
            yield 0, self._damaged_names(shard, db)

    def _walk(self, shard: int, db: sqlite3.Connection) -> tuple[dict[int, bytes], list[int]]:
        """Row number -> id from the index, and all row numbers, the table's too: either may be what is damaged."""
        try:
            pairs = db.execute("SELECT rowid, id FROM images INDEXED BY sqlite_autoindex_images_1 ORDER BY id").fetchall()
        except sqlite3.DatabaseError as error:
            raise self._told(error, shard) from error
        indexed = {rowid: id for rowid, id in pairs if is_key(id)}
        in_table = _as_far_as_it_goes(db, "SELECT rowid FROM images NOT INDEXED ORDER BY rowid")
        return indexed, sorted(indexed.keys() | {rowid for (rowid,) in in_table})

    def _look_at(self, db: sqlite3.Connection, rowid: int, expected: bytes | None, shard: int) -> bytes | None:
        """The id of a damaged row, None for an intact one. expected: its id in the index."""
        try:
            record = db.execute(f"SELECT {COLUMNS} FROM images WHERE rowid = ?", (rowid,)).fetchone()
        except sqlite3.DatabaseError as error:
            if is_operational(error):
                raise self._told(error, shard) from error
            return expected
        row = None if record is None else self._checked(record)
        if row is not None:
            return None if row.id == expected else row.id  # intact, but nobody would find it
        return expected if expected is not None or record is None or not is_key(record[0]) else record[0]

    def _damaged_names(self, shard: int, db: sqlite3.Connection) -> list[bytes]:
        try:
            records = db.execute("SELECT name, id, checksum, added FROM names").fetchall()
        except sqlite3.DatabaseError as error:
            raise self._told(error, shard) from error
        return sorted({record[1] for record in records if not self._name_holds(record) and is_key(record[1])})

    # ----------------------------------------------------------------------------------------------------------- inside
    def _values(self, row: Row) -> tuple:
        added = row.added or time.time()
        row = Row(row.id, row.n_visual, row.n_entries, row.kv, row.seen, added)
        return row.id, added, row.n_visual, row.n_entries, row.checksum(self.key), row.seen, row.kv

    def _checked(self, record: tuple) -> Row | None:
        id, added, n_visual, n_entries, checksum, seen, kv = record
        if not (isinstance(id, bytes) and isinstance(seen, bytes) and isinstance(kv, bytes)):
            return None
        row = Row(id, n_visual, n_entries, kv, seen, added)
        return row if row.checksum(self.key) == checksum else None

    def _name_checksum(self, name: bytes, id: bytes, added: float) -> bytes:
        return hashlib.sha256(self.key + id + f"{added!r} ".encode() + name).digest()[:16]

    def _name_holds(self, record: tuple) -> bool:
        name, id, checksum, added = record
        return isinstance(name, bytes) and is_key(id) and self._name_checksum(name, id, added) == checksum

    def _name_values(self, named: Sequence[tuple[str, bytes]], given: Mapping[str, float]) -> list[tuple]:
        now, values = time.time(), []
        for name, id in named:
            stored, added = name_as_stored(name), given.get(name, now)
            values.append((stored, id, self._name_checksum(stored, id, added), added))
        return values

    def _elsewhere(self, names: Sequence[tuple[str, bytes]]) -> dict[int, list[str]]:
        """Shard -> names that are there and will stand in another: their pictures have changed."""
        out: dict[int, list[str]] = {}
        target = {name: _shard_of(id) for name, id in names}
        for shard in range(N_SHARDS):
            wanted = [name for name, to in target.items() if to != shard]
            db = self._connect(shard, create=False) if wanted else None
            for start in range(0, len(wanted) if db is not None else 0, READ_AT_ONCE):
                chunk = wanted[start : start + READ_AT_ONCE]
                with self._speaking(shard):
                    assert db is not None
                    select = f"SELECT name FROM names WHERE name IN ({','.join('?' * len(chunk))})"
                    found = [
                        name_as_given(name)
                        for (name,) in db.execute(select, [name_as_stored(name) for name in chunk]).fetchall()
                    ]
                if found:
                    out.setdefault(shard, []).extend(found)
        return out


def _shard_of(id: bytes) -> int:
    return id[0] >> 4


def _as_far_as_it_goes(db: sqlite3.Connection, select: str) -> list[tuple]:
    """The records up to a malformed page."""
    found: list[tuple] = []
    try:
        for record in db.execute(select):
            found.append(record)
    except sqlite3.DatabaseError:
        pass
    return found
