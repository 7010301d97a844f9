"""ImageStore: another recipe, another format, a full or read-only disk are one clear line."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from htc_vlm import CompressedImages, ImageStore
from htc_vlm.store import UnknownImageError
from htc_vlm.store import shards as shards_module
from htc_vlm.store.about import About
from htc_vlm.store.shard_files import ShardFiles

from .. import tiny_runs as tiny
from .stores import open_store, png, shard, some


def test_another_recipe_is_refused_by_what_differs(tmp_path: Path) -> None:
    model, processor = tiny.loaded(tiny.VOCO)
    with open_store(tmp_path / "s") as store:
        ids = store.add([png(0)])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match=r"made with another recipe \(weights differ\)"):
        ImageStore.open(tmp_path / "s", other, processor)
    mean = processor.image_processor.image_mean
    with open_store(tmp_path / "s") as store:
        try:
            processor.image_processor.image_mean = [0.1, 0.2, 0.3]
            with pytest.raises(ValueError, match=r"another recipe \(processor.image_mean differ\)"):
                store.add([png(1)])
            with pytest.raises(ValueError, match=r"another recipe \(processor.image_mean differ\)"):
                ImageStore.open(tmp_path / "s", model, processor)
        finally:
            processor.image_processor.image_mean = mean
        assert len(store.get(ids)) == 1
    with pytest.raises(ValueError, match="another model or with other settings"):
        store.put(ids, CompressedImages(store.get(ids).kv, "0" * 64, 4))


def test_a_newer_or_foreign_store_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        id = store.add([png(0)])[0]
    about = (tmp_path / "s" / "store.json").read_text()
    (tmp_path / "s" / "store.json").write_text(about.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="a store of schema 2; this htc-vlm knows 1: install a newer one"):
        ImageStore.open(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text(about.replace('"dtype": "model"', '"dtype": "int4"'))
    with pytest.raises(ValueError, match="store.json: damaged"):
        ImageStore.open(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text(about)
    with sqlite3.connect(shard(store, id)) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ValueError, match="a store of schema 9"), open_store(tmp_path / "s") as newer:
        newer.get(id)
    with pytest.raises(ValueError, match="no store is there; give a model"):
        ImageStore.open(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is no store and not empty .*thesis.tex"):
        open_store(tmp_path / "full")
    with pytest.raises(ValueError, match="is a file; a store is a folder"):
        ImageStore.open(tmp_path / "full" / "thesis.tex")


def test_a_store_that_another_process_made_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path / "s") as store:
        ids = store.add([png(0)])
    reads = iter([None])  # this process looked before the other one had made it
    read = About.read
    monkeypatch.setattr(About, "read", lambda folder: next(reads, read(folder)))
    with open_store(tmp_path / "s") as store:
        assert store.add([png(0)]) == ids


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        with pytest.raises(UnknownImageError, match="no image " + "0" * 64):
            store.get(["0" * 64])
        with pytest.raises(UnknownImageError, match="no image named 'cat.png'"):
            store.get("cat.png")
        with pytest.raises(ValueError, match="no ids were given"):
            store.get([])
        assert store.remove("0" * 64) == 0 and len(store) == 0 and store.list() == [] and store.verify() == []
    with ImageStore.open(tmp_path / "s") as store, pytest.raises(ValueError, match="opened without a model"):
        store.add([png(0)])


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit of pages stands for the disk's."""
    ids, images = some(2000)
    real = shards_module.Shards._open

    def small(self: Any, path: Path, create: bool) -> sqlite3.Connection:
        db = real(self, path, create)
        db.execute("PRAGMA max_page_count = 12")
        return db

    monkeypatch.setattr(shards_module.Shards, "_open", small)
    with open_store(tmp_path / "s") as store:
        n_kept = 0
        with pytest.raises(OSError, match="the disk is full; what was added before is kept"):
            for start in range(0, 2000, 50):
                store.put(ids[start : start + 50], images[start : start + 50])
                n_kept += 50
        assert n_kept >= 100 and store.get(ids[:n_kept]).kv.equal(images.kv[:n_kept]) and store.verify() == []


def _sqlite(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


def test_a_closed_store_on_a_full_disk_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite makes an index of 32 KiB beside a file before it reads it; where that finds no room, nothing could be read."""
    ids, images = some(20)
    with open_store(tmp_path / "s") as store:
        store.put(ids[:10], images[:10], [f"p{i}" for i in range(10)])
    (tmp_path / "s" / f"{ids[10][0]}.sqlite").touch()  # what the failed `add` leaves, if no other picture was there
    real, full = ShardFiles._connection, True

    def connection(self: Any, path: Path, mode: str = "", is_frozen: bool = False) -> Any:
        if full and not is_frozen:
            raise _sqlite(sqlite3.SQLITE_IOERR_SHMSIZE, "disk I/O error")
        return real(self, path, mode, is_frozen)

    monkeypatch.setattr(ShardFiles, "_connection", connection)
    for read_only in (True, False):
        with ImageStore.open(tmp_path / "s", read_only=read_only) as store:
            assert store.get(ids[:10]).kv.equal(images.kv[:10]) and store.find("p3").hex() == ids[3]
            assert len(store) == len(store.list()) == 10 and store.verify() == []
            if not read_only:
                with pytest.raises(OSError, match="the disk is full; what was added before is kept"):
                    store.put(ids, images)
                full = False  # somebody made room: written to, and what another process writes is seen
                store.put(ids[:15], images[:15])
                with ImageStore.open(tmp_path / "s") as other:
                    other.put(ids[15:], images[15:])
                assert store.get(ids).kv.equal(images.kv) and len(store) == 20


def test_a_log_that_cannot_be_read_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed writer's store on a read-only disk: the error said that the store can be read."""
    ids, images = some(1)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images)
    (tmp_path / "s" / f"{ids[0][0]}.sqlite-wal").write_bytes(b"log")

    def connection(*words: Any, **named: Any) -> Any:
        raise _sqlite(sqlite3.SQLITE_READONLY_CANTINIT, "attempt to write a readonly database")

    monkeypatch.setattr(ShardFiles, "_connection", connection)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with ImageStore.open(tmp_path / "s") as store, pytest.raises(OSError, match="left a log beside it.*copy the whole folder"):
        store.get(ids)


def test_threads_that_ended_keep_no_files_open_and_too_many_are_named(tmp_path: Path) -> None:
    """Forty threads, one after the other, left 492 connections; the next was told that the store is read-only."""
    ids, images = some(40)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images)
        for _ in range(4):
            thread = threading.Thread(target=store.get, args=(ids,))
            thread.start()
            thread.join()
        assert len(store.get(ids)) == 40 and len(store._shards._connections) <= 32
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_store(tmp_path / "s") as store:
        held: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            with suppress(OSError):
                while True:
                    held.append(os.dup(0))
            with pytest.raises(OSError, match="too many open files; raise `ulimit -n`"):
                store.get(ids)
        finally:
            for one in held:
                os.close(one)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(store.get(ids)) == 40


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights to meet a folder it may not write to")
def test_a_read_only_store_is_read_and_says_so_when_written_to(tmp_path: Path) -> None:
    """A model on a shared disk: reading must not need to write a log beside it."""
    ids, images = some(3)
    folder = Path(tempfile.mkdtemp(prefix="htc-vlm-store-"))  # pytest's folders are root's alone
    folder.chmod(0o755)
    with open_store(folder / "s") as store:
        store.put(ids, images)
    for path in [folder / "s", *(folder / "s").iterdir()]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = (
        "import os, sys; from htc_vlm.store import ImageStore; os.setgid(65534); os.setuid(65534)\n"
        "store = ImageStore.open(sys.argv[1]); print(store.get(sys.argv[2:]).kv.sum().item(), store.verify(), len(store))\n"
        "try: store.remove(sys.argv[2])\n"
        "except OSError as error: print(error.filename, error.strerror)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder / "s"), *ids], capture_output=True, text=True)
    shutil.rmtree(folder)
    lines = out.stdout.splitlines()
    assert out.returncode == 0, out.stderr
    assert float(lines[0].split()[0]) == pytest.approx(float(images.kv.sum()), abs=1e-3) and lines[0].endswith("[] 3")
    assert lines[1] == f"{folder / 's'} is read-only; the store can be read"
