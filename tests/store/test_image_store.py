"""ImageStore: each picture once, in order, checked at each read; many processes; whatever is wrong is one clear line."""

from __future__ import annotations

import copy
import hashlib
import io
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import htc_vlm
from htc_vlm import CompressedImages, ImageStore
from htc_vlm.model.answering import Answerer
from htc_vlm.store import DamagedImageError, UnknownImageError
from htc_vlm.store import shards as shards_module
from htc_vlm.store.pictures import find, paths_of
from htc_vlm.store.shards import Shards

from .. import tinies
from .. import tiny_runs as tiny


def open_store(path: Path, dtype: str = "model", **options: Any) -> ImageStore:
    return ImageStore.open(path, *tiny.loaded(tiny.VOCO), dtype, **options)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    tiny.noise(seed).save(out, "PNG")
    return out.getvalue()


def some(n: int, seed: int = 0) -> tuple[list[str], CompressedImages]:
    """n ids and images as if they had been compressed, spread over all shards; quicker than a model."""
    model, _ = tiny.loaded(tiny.VOCO)
    shape = (n, tiny.N_LAYERS, 2, tiny.N_KV_HEADS, 1, tiny.HEAD_DIM)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ids = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(n)]
    return ids, CompressedImages(kv, model.recipe().digest, tiny.N_PATCHES)


def flip(path: Path, needle: bytes, at: int = 0) -> None:
    """Change one bit of the bytes `needle`, wherever they stand in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(needle) + at] ^= 1
    path.write_bytes(content)


def shard(store: ImageStore, id: str) -> Path:
    return store.path / f"{id[0]}.sqlite"


# ------------------------------------------------------------------------------------------------------------ add and get
def test_pictures_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    """Rows lie in sixteen files by their id; entries of another picture would be fluent answers about it."""
    pictures = [png(i) for i in range(5)]
    with open_store(tmp_path / "s") as store:
        ids = store.add(pictures, batch_size=2)
        assert ids == [hashlib.sha256(one).hexdigest() for one in pictures] and len(store) == 5 and ids.n_new == 5
        kept = store.get([ids[3], ids[0], ids[3]])
        answerer = Answerer(*tiny.loaded(tiny.VOCO))
        alone = torch.cat([answerer.encode([tiny.noise(i)]).kv for i in (3, 0, 3)])  # type: ignore[union-attr]
        assert kept.recipe == store.about.recipe.digest
        torch.testing.assert_close(kept.kv, alone, atol=1e-5, rtol=0)
        assert len(answerer.ask(kept, [0, 1], ["what is it ?"] * 2, 2)) == 2
    with ImageStore.open(tmp_path / "s") as again:  # by a process without the model
        assert again.get(ids).kv.equal(store.get(ids).kv) and again.list() and sorted(again.list()) == sorted(ids)


def test_files_folders_patterns_bytes_and_images_are_pictures(tmp_path: Path) -> None:
    """Folders inside folders are read; a PIL image has its pixels for a key; a text file in a folder is no picture."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.png", "deep/b.png", "c.jpg.txt"]):
        (tmp_path / "in" / name).write_bytes(png(i))
    with open_store(tmp_path / "s") as store:
        assert store.add(tmp_path / "in") == store.add([tmp_path / "in" / "a.png", str(tmp_path / "in" / "deep" / "b.png")])
        assert store.add(str(tmp_path / "in" / "*" / "*.png")) == [hashlib.sha256(png(1)).hexdigest()]
        assert store.add([png(0)]).n_new == 0
        of_pixels = store.add([tiny.noise(0), tiny.noise(0).convert("RGBA"), Image.new("CMYK", (9, 9))])
        assert of_pixels[0] == of_pixels[1] != hashlib.sha256(png(0)).hexdigest() and len(store) == 4
        with pytest.raises(ValueError, match="no file matches this pattern"):
            store.add(str(tmp_path / "*.gif"))
        with pytest.raises(ValueError, match="no pictures in this folder"):
            store.add(tmp_path / "s")
        with pytest.raises(ValueError, match="a path, bytes or a PIL image, got int"):
            store.add([3])  # type: ignore[list-item]


def test_equal_bytes_share_one_image_and_keep_both_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(0))
    with open_store(tmp_path / "s") as store:
        ids = store.add([tmp_path / "a.png", tmp_path / "b.png"])
        assert ids[0] == ids[1] and len(store) == 1 and ids.n_new == 1
        assert store.list()[0].names == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
        assert store.get(str(tmp_path / "b.png")).kv.equal(store.get(ids[0]).kv)
        assert str(tmp_path / "a.png") in store and "c.png" not in store


def test_a_changed_file_is_another_picture_under_its_name(tmp_path: Path) -> None:
    """A name that still leads to the old picture answers about it."""
    path = tmp_path / "a.png"
    with open_store(tmp_path / "s") as store:
        for i in range(4):
            path.write_bytes(png(i))
            id = store.add(path)[0]
            assert store.find(str(path)).hex() == id == hashlib.sha256(png(i)).hexdigest()
        assert len(store) == 4 and len(store.list(name="a.png")) == 1


def test_broken_pictures_are_listed_and_hold_nothing_up(tmp_path: Path) -> None:
    folder = tiny.hostile_folder(tmp_path / "wild")
    told: list[str] = []
    with open_store(tmp_path / "s") as store:
        files = sorted(folder.iterdir())
        added = store.add([*files, folder / "missing.png"], on_refused=lambda name, reason: told.append(name))
        assert len(set(added)) == len(store) and {Path(name).name for name in told} == {*tiny.BAD, "missing.png"}
        assert [name for name, _ in added.refused] == told and all(reason for _, reason in added.refused)
        with pytest.warns(UserWarning, match="1 pictures left out, e.g. .*missing.png"):
            store.add(folder / "missing.png")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_store_packs_as_it_was_made(dtype: str, tmp_path: Path) -> None:
    ids, images = some(40)
    with open_store(tmp_path / "s", dtype) as store:
        store.put(ids, images)
        assert store.get(ids).kv.equal(images.as_dtype(dtype).kv) and store.get(ids).dtype == dtype
    with open_store(tmp_path / "s") as again:
        assert again.about.dtype == dtype
    with pytest.raises(ValueError, match=f"keeps {dtype}, not int2"):
        open_store(tmp_path / "s", "int2")


def test_int2_is_calibrated_on_the_first_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels are written once, with a checksum, and used by every process."""
    ids, images = some(3)
    with open_store(tmp_path / "s", "int2") as store:
        with pytest.raises(ValueError, match="int2 has no levels yet"):
            store.put(ids, images)
        with pytest.raises(ValueError, match="int2 needs 64 images or more.*got 2"):
            store.add([png(0), png(1)])
        monkeypatch.setattr("htc_vlm.model.packing.LEAST_CALIBRATION", 4)
        added = store.add([png(i) for i in range(6)])
        assert store.get(added).nbytes == 6 * tiny.N_LAYERS * 2 * tiny.N_KV_HEADS * tiny.HEAD_DIM // 4
    with open_store(tmp_path / "s") as again:
        again.put(ids, images)
        assert again.about.levels is not None and again.get(ids).kv.equal(images.as_dtype("int2", again.about.levels).kv)
    content = bytearray((tmp_path / "s" / "levels.safetensors").read_bytes())
    content[-40] ^= 4
    (tmp_path / "s" / "levels.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="levels.safetensors: damaged"):
        ImageStore.open(tmp_path / "s")


def test_a_stock_model_keeps_what_a_method_leaves(tmp_path: Path) -> None:
    """Compress once, ask for ever, without training: what is stored is what `htc_vlm.compress` gives, and answers as that."""
    model, processor = htc_vlm.load(tinies.save_llava(tmp_path / "llava"))
    divprune = {"name": "divprune", "n_keep": 4}
    with pytest.raises(ValueError, match="has no bottleneck; name a question-independent method"):
        ImageStore.open(tmp_path / "s", model, processor)
    with ImageStore.open(tmp_path / "s", model, processor, method=divprune) as store:
        kept = store.get(store.add([png(0), png(1)]))
        expected = htc_vlm.compress(model, processor, [tiny.noise(0), tiny.noise(1)], "divprune", n_keep=4)
        torch.testing.assert_close(kept.kv, expected.kv, atol=1e-5, rtol=0)
        assert kept.recipe == expected.recipe and kept.prompt == expected.prompt
        asked = {"text": ["what is it ?", "where ?"], "max_new_tokens": 2}
        assert htc_vlm.generate(model, processor, compressed=kept, **asked) == htc_vlm.generate(
            model, processor, compressed=expected, **asked
        )
    with pytest.raises(ValueError, match=r"another recipe \(prompt.method.n_keep"):
        ImageStore.open(tmp_path / "s", model, processor, method={"name": "divprune", "n_keep": 5})
    with pytest.raises(ValueError, match="compresses with its own bottleneck"):
        ImageStore.open(tmp_path / "t", *tiny.loaded(tiny.VOCO), method="none")


def test_maps_travel_with_the_image(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", maps=True) as store:
        kept = store.get(store.add([png(0), png(1)]))
        assert kept.maps is not None and kept.maps.shape == (2, tiny.N_PATCHES) and kept.maps.amax(1).tolist() == [255, 255]


# ----------------------------------------------------------------------------------------------------------------- damage
def test_a_damaged_image_is_named_never_given_and_replaced_by_add(tmp_path: Path) -> None:
    """All six backends that were tried return flipped bytes without a word."""
    with open_store(tmp_path / "s") as store:
        ids = store.add([png(i) for i in range(6)])
        before = store.get(ids[2]).kv
        raw = store.get(ids[2]).row_bytes()[0]
    flip(shard(store, ids[2]), raw, 17)
    with open_store(tmp_path / "s") as store:
        with pytest.raises(DamagedImageError, match=f"image {ids[2]} is damaged"):
            store.get(ids)
        assert store.verify() == [ids[2]] and ids[2] not in store
        assert len(store.get([one for one in ids if one != ids[2]])) == 5
        assert store.add([png(2)]).n_new == 1 and store.verify() == [] and len(store) == 6
        torch.testing.assert_close(store.get(ids[2]).kv, before, atol=1e-5, rtol=0)


def test_a_damaged_id_or_name_leads_to_no_other_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    with open_store(tmp_path / "s") as store:
        id = store.add([tmp_path / "a.png"])[0]
    flip(shard(store, id), str(tmp_path / "a.png").encode() + bytes.fromhex(id), len(str(tmp_path / "a.png")) + 31)
    with open_store(tmp_path / "s") as store:
        with pytest.raises(DamagedImageError, match="the name .*a.png' is damaged"):
            store.get(str(tmp_path / "a.png"))
        assert store.verify() and store.get(id)
        store.add([tmp_path / "a.png"])
        assert store.find(str(tmp_path / "a.png")).hex() == id


def test_no_flipped_byte_gives_another_image(tmp_path: Path) -> None:
    """24 bytes anywhere in the files, one at a time: what is still given is what was put in; what is not is told."""
    ids, images = some(128)
    whole = dict(zip(ids, images.row_bytes(), strict=True))
    with open_store(tmp_path / "s") as store:
        store.put(ids, images, [f"picture {i}" for i in range(128)])
    files = sorted((tmp_path / "s").glob("*.sqlite"))
    generator = torch.Generator().manual_seed(1)
    n_told = 0
    for _ in range(24):
        path = files[int(torch.randint(len(files), (), generator=generator))]
        before = path.read_bytes()
        damaged = bytearray(before)
        damaged[int(torch.randint(len(before), (), generator=generator))] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(damaged)
        with ImageStore.open(tmp_path / "s") as store:
            lost = set()
            for id in [one for one in ids if path.name.startswith(one[0])]:
                try:
                    assert store.get(id).row_bytes()[0] == whole[id]
                except ValueError:
                    lost.add(id)
            try:
                assert lost <= set(store.verify())
            except DamagedImageError as error:
                assert path.name in str(error)
            n_told += bool(lost)
        for leftover in path.parent.glob(f"{path.name}-*"):
            leftover.unlink()
        path.write_bytes(before)
    assert n_told >= 3


def test_a_file_that_is_no_database_any_more_is_named(tmp_path: Path) -> None:
    ids, images = some(40)
    with open_store(tmp_path / "s") as store:
        store.put(ids, images)
    shard(store, ids[0]).write_bytes(b"\0" * 8192)
    with open_store(tmp_path / "s") as store:
        for act in (store.verify, lambda: store.get(ids), lambda: store.put(ids, images)):
            with pytest.raises(DamagedImageError, match=rf"{ids[0][0]}.sqlite: is damaged.*move this file away"):
                act()
        shard(store, ids[0]).unlink()
    with open_store(tmp_path / "s") as store:
        store.put(ids, images)
        assert store.verify() == [] and len(store) == 40


# --------------------------------------------------------------------------------------------------------------- refusals
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

    def small(self: Any, path: Path) -> sqlite3.Connection:
        db = real(self, path)
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


# ------------------------------------------------------------------------------------------- keeping, merging, many at once
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


def test_what_stands_for_pictures(tmp_path: Path) -> None:
    """A name with a bracket is a file before it is a pattern."""
    (tmp_path / "a[1].png").write_bytes(png(0))
    assert paths_of(tmp_path / "a[1].png") == [tmp_path / "a[1].png"]
    assert [found.error for found in find([tmp_path / "b.png"])] == [f"{tmp_path / 'b.png'}: no such file; check the path"]
