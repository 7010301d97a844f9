"""ImageStore: each picture once, in order, packed as the store was made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageDraw

import htc_vlm
from htc_vlm import ImageStore
from htc_vlm.model.answering import Answerer
from htc_vlm.model.packing import Levels
from htc_vlm.store.pictures import find, paths_of

from .. import tinies
from .. import tiny_runs as tiny
from .stores import open_store, png, some


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


def _shape(of: str, kind: str) -> Image.Image:
    """Black, with a circle or a square in its alpha alone."""
    alpha = Image.new("L", (40, 40))
    getattr(ImageDraw.Draw(alpha), of)((8, 8, 31, 31), fill=255)
    return Image.merge("LA", (Image.new("L", (40, 40)), alpha)).convert(kind)


def test_an_images_id_is_of_the_pixels_that_are_compressed(tmp_path: Path) -> None:
    """`convert("RGB")` drops alpha and clips deep grey: a square's id was the circle's, and the store answered about that."""
    values = np.random.default_rng(0).random((4, 30, 40))
    deep = [Image.fromarray((300 + 60000 * one).astype(np.uint16)) for one in values[:2]]
    unit = [Image.fromarray(one.astype(np.float32)) for one in values[2:]]
    pictures = [_shape("ellipse", "RGBA"), _shape("rectangle", "RGBA"), _shape("ellipse", "La"), *deep, *unit]
    with open_store(tmp_path / "s") as store:
        ids = store.add(pictures)
        assert ids.n_new == len(set(ids)) == 6 and ids[0] == ids[2] and not ids.refused
        plain = tiny.noise(0)
        assert store.add(plain) == [hashlib.sha256(b"pixels (40, 30) " + plain.tobytes()).hexdigest()]


def test_a_pil_image_is_turned_upright_and_a_broken_one_holds_nothing_up(tmp_path: Path) -> None:
    """A photo that lies on its side by its EXIF; a cut file, no pixels, 32-bit grey: one of them ended the whole `add`."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for kind in ("RGB", "L"):
        tiny.noise(0).convert(kind).save(tmp_path / f"{kind}.png", exif=exif)
    tiny.noise(1, (200, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    broken = [Image.open(tmp_path / "cut.jpg"), Image.new("RGB", (0, 5)), Image.fromarray(np.full((9, 9), 70000, np.int32))]
    with open_store(tmp_path / "s") as store:
        for kind in ("RGB", "L"):
            upright = tiny.noise(0).convert(kind).transpose(Image.Transpose.ROTATE_270).convert("RGB")
            assert store.add(Image.open(tmp_path / f"{kind}.png")) == store.add(upright)
        with pytest.warns(UserWarning, match="3 pictures left out"):
            added = store.add([tiny.noise(1), *broken, tiny.noise(2)])
        assert len(added) == 2 and [name for name, _ in added.refused] == ["picture 1", "picture 2", "picture 3"]
        assert "truncated" in added.refused[0][1] and "no pixels" in added.refused[1][1]


def test_a_name_that_no_file_can_have_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    with open_store(tmp_path / "s") as store, pytest.warns(UserWarning, match="2 pictures left out"):
        added = store.add([tmp_path / "a.png", "x" * 300, "x" * 300 + "*"])
        assert len(added) == 1 and "File name too long" in added.refused[0][1]


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


def test_maps_are_made_for_images_that_have_none(tmp_path: Path) -> None:
    """`add --maps` passed over what was there, and said nothing."""
    with open_store(tmp_path / "s") as store:
        ids = store.add([png(0), png(1)])
    with open_store(tmp_path / "s", maps=True) as store:
        assert store.add([png(0)]).n_new == 1 and store.add([png(0)]).n_new == 0 and len(store) == 2
        assert store.get(ids[0]).maps is not None and store.get(ids[1]).maps is None


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    ids, images = some(2)
    levels, others = (Levels.fit(torch.randn(64, *images.kv.shape[1:]) * scale) for scale in (1, 5))
    open_store(tmp_path / "s").close()
    with open_store(tmp_path / "t", "int2", levels=levels) as store:
        store.put(ids, images)
    ImageStore.open(tmp_path / "t", levels=levels).close()
    for folder, options, message in [
        ("s", {"levels": levels}, "levels are for int2, and this store keeps model"),
        ("t", {"levels": others}, "has int2 levels of its own, which differ"),
        ("s", {"maps": True}, "method and maps are for adding; give a model"),
        ("s", {"method": "none"}, "method and maps are for adding; give a model"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageStore.open(tmp_path / folder, **options)  # type: ignore[arg-type]


def test_a_name_that_would_be_taken_for_an_id_is_refused(tmp_path: Path) -> None:
    """It was kept, and never found. A file that is called by its own digest is fine."""
    ids, images = some(2)
    with open_store(tmp_path / "s") as store:
        for act in (lambda: store.put(ids, images, [ids[1], ids[0]]), lambda: store.name([(ids[0], ids[1])])):
            with pytest.raises(ValueError, match="a name of 64 hex digits is taken for an id"):
                act()
        store.put(ids, images, list(ids))
        assert store.get(ids).kv.equal(images.kv)


def test_what_stands_for_pictures(tmp_path: Path) -> None:
    """A name with a bracket is a file before it is a pattern."""
    (tmp_path / "a[1].png").write_bytes(png(0))
    assert paths_of(tmp_path / "a[1].png") == [tmp_path / "a[1].png"]
    assert [found.error for found in find([tmp_path / "b.png"])] == [f"{tmp_path / 'b.png'}: no such file; check the path"]
