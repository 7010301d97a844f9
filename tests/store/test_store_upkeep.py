"""ImageStore: lists, removal, merging, export; many processes at once."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from htc_vlm import CompressedImages, ImageStore
from htc_vlm.store.shards import Shards
from htc_vlm_cli import main

from .. import tiny_runs as tiny
from .stores import open_store, some


def test_pages_of_a_list_are_in_order_and_cost_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call sorted all rows: 100,000 images took seconds a page. Merged rows keep their times, names are looked up."""
    with open_store(tmp_path / "s") as store, open_store(tmp_path / "t") as other:
        old, new = some(40, 1), some(60, 2)
        other.put(*old)
        store.put(*new, [f"n{i}.png" for i in range(60)])
        store.merge(other)
        times = {str(one): one.added for one in store.list()}
        assert len(times) == 100 and list(times.values()) == sorted(times.values())
        assert set(list(times)[:40]) == set(old[0])  # merged last, added first
        pages, after = [], None
        while page := store.list(limit=7, after=after):
            pages.append(page)
            after = page[-1]
        assert [len(page) for page in pages] == [7] * 14 + [2] and [one for page in pages for one in page] == list(times)
        named = store.list(name="n5")
        assert len(named) == 11 and all(one.names[0].startswith("n5") for one in named)
        assert store.list(limit=3, name="n5", after=named[1]) == named[2:5]
        read: list[int] = []
        select = Shards.select
        monkeypatch.setattr(Shards, "select", lambda *words: read.append(len(found := select(*words))) or found)
        store.list(limit=2, after=pages[3][0])
        assert sum(read) <= 16 * 2 + 3


def test_removed_room_is_given_back(tmp_path: Path) -> None:
    ids, images = some(400)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images, [f"p{i}" for i in range(400)])
        assert store.remove(ids[:300]) == 300 and len(store) == 100 and "p0" not in store and "p399" in store
        assert store.compact() > 0 and store.get(ids[300:]).kv.equal(images.kv[300:]) and store.verify() == []


def test_merging_takes_images_and_names_over(tmp_path: Path) -> None:
    ids, images = some(40)
    with open_store(tmp_path / "a") as a, open_store(tmp_path / "b") as b, open_store(tmp_path / "c", "int4") as c:
        a.put(ids[:25], images[:25], [f"p{i}" for i in range(25)])
        b.put(ids[20:], images[20:], [f"q{i}" for i in range(20)])
        assert a.merge(tmp_path / "b") == 15 and len(a) == 40 and a.get(ids).kv.equal(images.kv)
        assert a.find("q19").hex() == ids[39] and a.find("q0") == a.find("p20")
        with pytest.raises(ValueError, match="its int4 is packed in another way"):
            a.merge(c)
        with pytest.raises(ValueError, match="is the same store"):
            a.merge(a)


def test_a_name_goes_to_the_picture_it_was_given_to_last(tmp_path: Path) -> None:
    """Within one call the highest file's picture had it; a merge gave it to the older picture of the other store."""
    ids, images = some(40)
    with open_store(tmp_path / "a") as old, open_store(tmp_path / "b") as new, open_store(tmp_path / "c") as all_of_them:
        old.put(ids[:20], images[:20], ["n.png", "o.png"] + [None] * 18)  # type: ignore[list-item]
        new.put(ids[20:], images[20:], ["n.png"] + [None] * 19)  # type: ignore[list-item]
        for last in (max(ids[20:]), min(ids[20:])):
            new.name([("dup", max(ids[20:])), ("dup", min(ids[20:])), ("dup", last)])
            assert new.find("dup").hex() == last
        assert new.merge(old) == 20 and new.find("n.png").hex() == ids[20] and new.find("o.png").hex() == ids[1]
        for one in (new, old):
            all_of_them.merge(one)
        assert all_of_them.find("n.png").hex() == ids[20] and old.merge(new) == 20 and old.find("n.png").hex() == ids[20]


def test_unknown_ones_are_passed_over_when_removed(tmp_path: Path) -> None:
    ids, images = some(2)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images, ["a", "b"])
        assert store.remove(["a", "nobody", "0" * 64]) == 1 and store.list() == ids[1:]


def test_a_name_that_is_no_utf8_leaves_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file name of another age, `caf\\xe9.png`: the whole export died of it, and so did the list on a terminal."""
    parquet = pytest.importorskip("pyarrow.parquet")
    ids, images = some(1)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images, ["caf\udce9.png"])
        assert store.find("caf\udce9.png").hex() == ids[0] and store.list()[0].names == ["caf\udce9.png"]
        store.export(tmp_path / "x.parquet")
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist()[0]["names"] == ["caf\\udce9.png"]
    assert main(["store", "list", str(tmp_path / "s")]) == 0 and "caf\\udce9.png" in capsys.readouterr().out


def test_images_are_exported_to_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    ids, images = some(5)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images, [f"p{i}" for i in range(5)])
        assert store.export(tmp_path / "x.parquet") == 5
    rows = {row["id"]: row for row in parquet.read_table(tmp_path / "x.parquet").to_pylist()}
    assert [rows[id]["kv"] for id in ids] == images.row_bytes() and rows[ids[3]]["names"] == ["p3"]


def _put(path: Path, recipe: str, seed: int, ready: Any) -> None:
    ids, images = some(0)
    shape = (200, tiny.N_LAYERS, 2, tiny.N_KV_HEADS, 1, tiny.HEAD_DIM)
    kv = torch.full(shape, float(seed))
    ids = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(200)]
    ready.wait()
    with ImageStore.open(path) as store:
        for start in range(0, 200, 20):
            names = [f"{seed} {i}" for i in range(start, start + 20)]
            store.put(ids[start : start + 20], CompressedImages(kv[:20], recipe, 4), names)


def test_two_processes_write_while_one_reads(tmp_path: Path) -> None:
    """Locks that are not waited for, or a store that only its writer can read."""
    with open_store(tmp_path / "s") as store:
        context = multiprocessing.get_context("fork")
        ready = context.Barrier(3)
        recipe = store.about.recipe.digest
        writers = [context.Process(target=_put, args=(tmp_path / "s", recipe, seed, ready)) for seed in (1, 2)]
        for one in writers:
            one.start()
        ready.wait()
        while any(one.is_alive() for one in writers):
            for entry in store.list(limit=50):
                assert float(store.get(entry).kv.std()) == 0
        for one in writers:
            one.join()
        assert [one.exitcode for one in writers] == [0, 0] and len(store) == 400 and store.verify() == []
        assert float(store.get("2 199").kv.mean()) == 2


def test_a_store_that_was_open_can_be_used_after_a_fork(tmp_path: Path) -> None:
    """SQLite's connections must not cross a fork: DataLoader's workers are forks."""
    ids, images = some(5)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images)

        def child(answer: Any) -> None:
            answer.put(store.get(ids).kv.sum().item())

        context = multiprocessing.get_context("fork")
        answer = context.Queue()
        process = context.Process(target=child, args=(answer,))
        process.start()
        assert answer.get(timeout=600) == pytest.approx(images.kv.sum().item())
        process.join()
        store.put(*some(5, seed=1))
        assert len(store) == 10
