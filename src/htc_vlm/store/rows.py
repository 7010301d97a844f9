"""One stored image as a row, its checksum, and the tables that rows stand in.

Source:  ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

SCHEMA = 1

IN_ORDER = "CREATE INDEX IF NOT EXISTS images_in_order ON images (added, id)"
TABLES = f"""
CREATE TABLE IF NOT EXISTS images (id BLOB PRIMARY KEY, added REAL NOT NULL, n_visual INTEGER NOT NULL,
    n_entries INTEGER NOT NULL, checksum BLOB NOT NULL, seen BLOB NOT NULL, kv BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS names (name BLOB PRIMARY KEY, id BLOB NOT NULL, checksum BLOB NOT NULL, added REAL NOT NULL);
CREATE INDEX IF NOT EXISTS names_of ON names (id);
{IN_ORDER};
"""
COLUMNS = "id, added, n_visual, n_entries, checksum, seen, kv"
PUT_IMAGE = f"INSERT OR REPLACE INTO images ({COLUMNS}) VALUES (?,?,?,?,?,?,?)"
PUT_NAME = "INSERT OR REPLACE INTO names (name, id, checksum, added) VALUES (?,?,?,?)"


class DamagedImageError(ValueError):
    """A stored image whose bytes are not those that were written."""


class UnknownImageError(ValueError):
    """An id or a name that the store does not have."""


@dataclass(frozen=True)
class Row:
    """One stored image. id: 32 bytes. kv: keys and values as packed; seen: its map, b"" without."""

    id: bytes
    n_visual: int
    n_entries: int
    kv: bytes
    seen: bytes = b""
    added: float = 0.0

    def checksum(self, key: bytes) -> bytes:
        """16 bytes of SHA-256 over everything in the row and `key`, which says what made it."""
        made = hashlib.sha256(key + self.id)
        made.update(f"{self.n_visual} {self.n_entries} {len(self.seen)} {len(self.kv)} {self.added!r} ".encode())
        made.update(self.seen)
        made.update(self.kv)
        return made.digest()[:16]


def is_key(value: object) -> bool:
    """A flipped bit may make a number of it."""
    return isinstance(value, bytes) and len(value) == 32


def name_as_stored(name: str) -> bytes:
    """A name as stored: file names need not be UTF-8, and SQLite's text must."""
    return name.encode("utf-8", "surrogateescape")


def name_as_given(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def is_id(text: str) -> bool:
    return len(text) == 64 and all(one in "0123456789abcdef" for one in text)


def check_names(named: Iterable[tuple[str, bytes]]) -> None:
    """ValueError for a name that nobody would find, for it is taken for the id of another image."""
    for name, id in named:
        if is_id(name) and name != id.hex():
            raise ValueError(f"{name}: a name of 64 hex digits is taken for an id; give another, or a file's whole path")


def key_of(text: str) -> bytes:
    if not is_id(text):
        raise ValueError(f"{text!r} is no id; an id is the SHA-256 of a picture's bytes in 64 hex digits")
    return bytes.fromhex(text)
