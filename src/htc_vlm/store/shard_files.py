"""The SQLite files of a store: opened, written in transactions, their errors told in the store's words.

Source:  sqlite.org/wal.html.
Differs: ours.

Writing is one transaction of a file; reading is autocommit, for a reader inside a transaction would let the write-ahead log
grow without end. A connection belongs to the thread and process that opened it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from htc_vlm.store.rows import (
    SCHEMA,
    TABLES,
    DamagedImageError,
)

BUSY_SECONDS = 120
OUTSIDE = {
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
}  # fmt: skip


class ShardFiles:
    """The files of one folder, numbered."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.folder, self.read_only = folder, read_only
        self._connections: dict[tuple[int, int, int], sqlite3.Connection] = {}
        self._lock = threading.Lock()

    def _commit(self, shard: int, statements: Sequence[tuple[str, list[tuple]]]) -> int:
        """Run statements as one transaction; how many rows the last one changed. An index that does not fit its rows any
        more (a flipped bit) is built anew from them."""
        try:
            with self._transaction(shard) as db:
                return [db.executemany(text, values).rowcount for text, values in statements][-1]
        except DamagedImageError:
            with self._speaking(shard):
                found = self._connect(shard, create=False)
                if found is None:
                    raise
                found.execute("REINDEX")
            with self._transaction(shard) as db:
                return [db.executemany(text, values).rowcount for text, values in statements][-1]

    @contextmanager
    def _transaction(self, shard: int) -> Iterator[sqlite3.Connection]:
        with self._speaking(shard):
            db = self._connect(shard, create=True)
            assert db is not None
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _speaking(self, shard: int) -> Iterator[None]:
        """SQLite's errors as what is wrong with the store, in one line."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._told(error, shard) from error

    def _told(self, error: Exception, shard: int) -> OSError | DamagedImageError:
        path, text = str(self.folder / _file(shard)), str(error)
        if "full" in text:
            return OSError(errno.ENOSPC, "the disk is full; what was added before is kept", path)
        if "readonly" in text or "unable to open" in text:
            return OSError(errno.EROFS, "cannot be written to (read-only); the store can be read", path)
        if "locked" in text:
            return OSError(errno.EBUSY, f"another process has been writing for {BUSY_SECONDS} s; try again", path)
        if is_operational(error):
            return OSError(errno.EIO, f"cannot be read or written ({text})", path)
        return DamagedImageError(
            f"{path}: is damaged beyond its rows ({text}); move this file away and add its pictures (those whose id begins "
            f"with {shard:x}) again"
        )

    def _connect(self, shard: int, create: bool) -> sqlite3.Connection | None:
        """This thread's connection; None where there is no such file and none is to be made."""
        where = (os.getpid(), threading.get_ident(), shard)
        known = self._connections.get(where)
        if known is not None:
            return known
        path = self.folder / _file(shard)
        if not path.exists() and (not create or self.read_only):
            if self.read_only and create:
                raise sqlite3.OperationalError("attempt to write a readonly database")
            return None
        with self._speaking(shard):
            db = self._open(path)
        with self._lock:
            self._connections[where] = db
        return db

    def _open(self, path: Path) -> sqlite3.Connection:
        options = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False, "uri": True}
        uri = path.absolute().as_uri()
        if not os.access(self.folder, os.W_OK):  # no log can be made beside it: nobody writes, or somebody else
            log = path.with_name(path.name + "-wal")
            is_quiet = not log.exists() or not log.stat().st_size
            db = sqlite3.connect(uri + ("?mode=ro&immutable=1" if is_quiet else "?mode=ro"), **options)  # type: ignore[call-overload]
        else:
            db = sqlite3.connect(uri, **options)  # type: ignore[call-overload]
        db.text_factory = bytes  # a flipped bit may make text of anything
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            db.close()
            raise ValueError(f"{path}: a store of schema {version}; this htc-vlm knows {SCHEMA}: install a newer one")
        if self.read_only:
            db.execute("PRAGMA query_only = ON")
        else:
            _patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))
            db.execute("PRAGMA synchronous = FULL")
            if version < SCHEMA:
                _patiently(lambda: db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;"))
        return db

    def close(self) -> None:
        """Close this process's connections; the write-ahead logs go into the files, so that these can be copied."""
        with self._lock:
            mine = {where: db for where, db in self._connections.items() if where[0] == os.getpid()}
            self._connections = {}
        last = {where[2]: db for where, db in mine.items()}
        for where, db in mine.items():
            if not self.read_only and last[where[2]] is db:
                with suppress(sqlite3.Error):  # another process is at work, or the disk is full: the log stays, and is read
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.close()


def _file(shard: int) -> str:
    return f"{shard:x}.sqlite"


def is_operational(error: Exception) -> bool:
    """Is it the disk's or another process's doing, rather than the file's content? A damaged schema is "no such column"."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.OperationalError) if code is None else code & 0xFF in OUTSIDE


def _patiently(act: Callable[[], object]) -> None:
    """Try again while another process makes the same file: SQLite does not wait for a change of the journal's mode."""
    for attempt in range(200):
        try:
            act()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or attempt == 199:
                raise
            time.sleep(0.05)
