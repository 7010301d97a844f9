"""The SQLite files of a store: opened, written in transactions, their errors told in the store's words.

Source:  sqlite.org/wal.html.
Differs: ours.

Writing is one transaction of a file; reading is autocommit, for a reader inside a transaction would let the write-ahead log
grow without end. A connection belongs to the thread and process that opened it. Where no log can be made beside a file (a
read-only folder, a full disk), it is read as it stands, and opened anew once it has changed.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
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
FILES_OF_ONE = 3  # open files of a connection: the database, its log, the log's index
OUTSIDE = {
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
}  # fmt: skip
# What SQLite says where it may not make the index of a log that is there.
NO_INDEX = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY_RECOVERY, sqlite3.SQLITE_READONLY_CANTLOCK,
            sqlite3.SQLITE_READONLY_CANTINIT}  # fmt: skip
Stamp = tuple[int, int, int]


class Connection(sqlite3.Connection):
    """stamp: of a file that is read as it stands, what it was like then; None for one whose changes are seen."""

    stamp: Stamp | None = None


class ShardFiles:
    """The files of one folder, numbered."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.folder, self.read_only = folder, read_only
        self._connections: dict[tuple[int, int, int], Connection] = {}
        self._replaced: list[Connection] = []
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
        code = getattr(error, "sqlite_errorcode", None)
        if "full" in text or code == sqlite3.SQLITE_IOERR_SHMSIZE:
            return OSError(errno.ENOSPC, "the disk is full; what was added before is kept", path)
        if code in NO_INDEX and not os.access(self.folder, os.W_OK) and not _is_quiet(Path(path)):
            told = "a writer was killed and left a log beside it, which is read only where the folder can be written to; "
            return OSError(errno.EROFS, told + "copy the whole folder to such a place and open it there", path)
        if "readonly" in text:
            return OSError(errno.EROFS, "cannot be written to (read-only); the store can be read", path)
        if "unable to open" in text:
            n_free = _free_files(self.folder)
            if n_free < FILES_OF_ONE:
                told = f"too many open files; raise `ulimit -n`, or use fewer threads (each opens up to {16 * FILES_OF_ONE})"
                return OSError(errno.EMFILE, told, path)
            return OSError(errno.EACCES, "cannot be opened; check the permissions of the folder and the files in it", path)
        if "locked" in text:
            return OSError(errno.EBUSY, f"another process has been writing for {BUSY_SECONDS} s; try again", path)
        if is_operational(error):
            return OSError(errno.EIO, f"cannot be read or written ({text})", path)
        return DamagedImageError(
            f"{path}: is damaged beyond its rows ({text}); move this file away and add its pictures (those whose id begins "
            f"with {shard:x}) again"
        )

    def _connect(self, shard: int, create: bool) -> Connection | None:
        """This thread's connection; None where there is no such file, or one without tables, and none is to be made."""
        where = (os.getpid(), threading.get_ident(), shard)
        path = self.folder / _file(shard)
        known = self._connections.get(where)
        if known is not None and (known.stamp is None or (not create and known.stamp == _stamp(path) and _is_quiet(path))):
            return known
        if create and (self.read_only or not os.access(self.folder, os.W_OK)):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        if not create and not path.exists():
            return None
        with self._speaking(shard):
            db = self._open(path, create)
            try:
                is_made = self._prepare(db, path, create)
            except BaseException:
                db.close()
                raise
        if not is_made:  # a writer was killed, or is about to make its tables
            db.close()
            return None
        self._keep(where, db)
        return db

    def _keep(self, where: tuple[int, int, int], db: Connection) -> None:
        """As this thread's; those of threads that have ended are closed."""
        with self._lock:
            threads = sys._current_frames().keys()
            ended = [one for one in self._connections if one[0] == where[0] and one[1] not in threads]
            closing = [self._connections.pop(one) for one in ended]
            if where in self._connections:
                self._replaced.append(self._connections[where])  # somebody may be reading from it
            self._connections[where] = db
        for one in closing:
            one.close()

    def _open(self, path: Path, create: bool) -> Connection:
        """A connection that has read the file's first page."""
        if not os.access(self.folder, os.W_OK):  # no log can be made beside it: nobody writes, or somebody else
            return self._connection(path, is_frozen=True) if _is_quiet(path) else self._connection(path, "?mode=ro")
        try:
            return self._connection(path)
        except sqlite3.OperationalError as error:
            no_room = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)
            if create or not no_room or not _is_quiet(path):
                raise
            return self._connection(path, is_frozen=True)

    def _connection(self, path: Path, mode: str = "", is_frozen: bool = False) -> Connection:
        uri = path.absolute().as_uri() + ("?mode=ro&immutable=1" if is_frozen else mode)
        stamp = _stamp(path) if is_frozen else None
        options = {"timeout": BUSY_SECONDS, "isolation_level": None, "check_same_thread": False, "uri": True}
        db = sqlite3.connect(uri, factory=Connection, **options)  # type: ignore[call-overload]
        try:
            db.stamp = stamp
            db.text_factory = bytes  # a flipped bit may make text of anything
            db.execute("PRAGMA user_version").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: Connection, path: Path, create: bool) -> bool:
        """Make tables where that is asked for; are there any?"""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise ValueError(f"{path}: a store of schema {version}; this htc-vlm knows {SCHEMA}: install a newer one")
        is_made = version == SCHEMA or bool(db.execute("SELECT 1 FROM sqlite_master").fetchone())
        if self.read_only or db.stamp is not None:
            db.execute("PRAGMA query_only = ON")
            return is_made
        if is_made or create:
            _patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))
            db.execute("PRAGMA synchronous = FULL")
            if version < SCHEMA:
                _patiently(lambda: db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;"))
        return is_made or create

    def close(self) -> None:
        """Close this process's connections; the write-ahead logs go into the files, so that these can be copied."""
        with self._lock:
            mine = {where: db for where, db in self._connections.items() if where[0] == os.getpid()}
            self._connections = {}
            replaced, self._replaced = self._replaced, []
        for db in replaced:
            db.close()
        last = {where[2]: db for where, db in mine.items()}
        for where, db in mine.items():
            if not self.read_only and last[where[2]] is db:
                with suppress(sqlite3.Error):  # another process is at work, or the disk is full: the log stays, and is read
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.close()


def _file(shard: int) -> str:
    return f"{shard:x}.sqlite"


def _is_quiet(path: Path) -> bool:
    """Is nothing in the log beside it?"""
    log = path.with_name(path.name + "-wal")
    return not log.exists() or not log.stat().st_size


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _free_files(folder: Path) -> int:
    """How many more files this process may open, up to what a connection needs."""
    opened: list[int] = []
    with suppress(OSError):
        while len(opened) < FILES_OF_ONE:
            opened.append(os.open(folder, os.O_RDONLY))
    for one in opened:
        os.close(one)
    return len(opened)


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
