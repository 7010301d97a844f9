"""ImageStore: what is damaged is named and never given; every read is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from htc_vlm import ImageStore
from htc_vlm.store import DamagedImageError, UnknownImageError

from .stores import flip, open_store, png, shard, some


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


def test_a_file_without_tables_is_empty_until_they_are_made(tmp_path: Path) -> None:
    """A writer that was killed, or is at work, between making a file and its tables: readers were told of damage."""
    ids, images = some(40)
    with open_store(tmp_path / "s") as store:
        store.put(ids[:1], images[:1])
    for name in "0123456789abcdef":
        (tmp_path / "s" / f"{name}.sqlite").touch()
    with ImageStore.open(tmp_path / "s", read_only=True) as reader, open_store(tmp_path / "t") as taker:
        assert len(reader) == len(reader.list()) == 1 and reader.verify() == [] and taker.merge(reader) == 1
        with pytest.raises(UnknownImageError):
            reader.find("cat.png")
        with open_store(tmp_path / "s") as store:
            store.put(ids, images, [f"p{i}" for i in range(40)])
        assert len(reader) == 40 and reader.find("p7").hex() == ids[7]
