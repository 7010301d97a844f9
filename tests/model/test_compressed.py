"""CompressedImages: indexing, concatenation, files, and the refusal of what is foreign or damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from htc_vlm.model import CompressedImages
from htc_vlm.model.packing import Levels

from ..tinies import BOTTLENECK, batch, build, pixels, shared

VOCO = {"name": "voco", "n_bottleneck": 3}


@pytest.fixture(scope="module")
def kv() -> CompressedImages:
    return shared(VOCO).compress(pixel_values=pixels(3))


def test_cells_are_one_tensor_of_the_promised_shape(kv: CompressedImages) -> None:
    """(N images, layers, 2, kv heads, K, head dim): 3 layers, 2 kv heads of 32 / 4 = 8."""
    assert kv.kv.shape == (3, 3, 2, 2, 3, 8)
    assert len(kv) == 3 and kv.n_bottleneck == 3 and kv.n_visual == (16, 16, 16)


def test_nbytes_counts_what_is_stored(kv: CompressedImages) -> None:
    """By hand: 3 layers x keys and values x 2 heads x 3 tokens x 8 numbers x 4 bytes = 1152 per image."""
    assert kv[0].nbytes == 1152 and kv.nbytes == 3 * 1152
    assert kv.to(torch.bfloat16).nbytes == 3 * 576


def test_an_index_gives_compressed_images_again(kv: CompressedImages) -> None:
    """An index that drops a dimension makes kv[0] useless for everything else."""
    assert kv[1].kv.equal(kv.kv[1:2]) and kv[-1].kv.equal(kv.kv[2:])
    assert kv[:2].kv.equal(kv.kv[:2]) and kv[[2, 0]].kv.equal(kv.kv[[2, 0]])
    assert [one.kv.shape[0] for one in kv] == [1, 1, 1]
    assert kv[0].recipe == kv.recipe
    with pytest.raises(IndexError, match="image 3 of 3"):
        kv[3]


def test_each_image_is_compressed_as_if_alone(kv: CompressedImages) -> None:
    """A stored image must not depend on the batch it was compressed in."""
    for i in range(3):
        alone = shared(VOCO).compress(pixel_values=pixels(3)[i : i + 1])
        torch.testing.assert_close(alone.kv, kv[i].kv, atol=1e-5, rtol=0)


def test_concat_puts_images_of_one_model_together(kv: CompressedImages) -> None:
    assert CompressedImages.concat([kv[2], kv[:2]]).kv.equal(kv.kv[[2, 0, 1]])
    other = CompressedImages(kv.kv, "0123456789abcdef", kv.n_visual)
    with pytest.raises(ValueError, match="images of different models.*0123456789abcdef"):
        CompressedImages.concat([kv, other])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        CompressedImages.concat([])


def test_a_saved_file_is_read_as_it_was(kv: CompressedImages, tmp_path: Path) -> None:
    for one in (kv, kv.to(torch.bfloat16), kv[1]):
        one.save(tmp_path / "x.safetensors")
        again = CompressedImages.load(tmp_path / "x.safetensors")
        assert again.kv.equal(one.kv) and again.kv.dtype == one.kv.dtype
        assert (again.recipe, again.n_visual) == (one.recipe, one.n_visual)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_another_model_is_refused(kv: CompressedImages) -> None:
    """Cells of another model have the right shape and give fluent nonsense."""
    other = build(VOCO)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    question = batch([[5, 6]])
    for ask in (other.generate, other):
        with pytest.raises(ValueError, match="compressed by another model or with other settings"):
            ask(**question, compressed=kv)
    with pytest.raises(ValueError, match="compressed by another model or with other settings"):
        shared({**VOCO, "positions": "compact"}).generate(**question, compressed=kv)
    with pytest.raises(ValueError, match="'none' has no bottleneck"):
        shared({"name": "none"}).generate(**question, compressed=kv)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        CompressedImages.load(tmp_path / "nowhere.safetensors")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    """A model's weights are safetensors too."""
    save_file({"kv": torch.zeros(1, 1, 2, 1, 1, 2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="weights.safetensors: not a file of compressed images"):
        CompressedImages.load(tmp_path / "weights.safetensors")


def test_a_damaged_file_is_refused(kv: CompressedImages, tmp_path: Path) -> None:
    """Cut short by a full disk, a text file of that name, junk behind it, or values that are no numbers."""
    path = tmp_path / "x.safetensors"
    kv.save(path)
    whole = path.read_bytes()
    foreign = b"hello, this is no safetensors file" * 10
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:4], b"", whole + b"junk", foreign):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors: damaged"):
            CompressedImages.load(path)
    broken = CompressedImages(kv.kv.clone().fill_(float("nan")), kv.recipe, kv.n_visual)
    broken.save(path)
    with pytest.raises(ValueError, match="not finite"):
        CompressedImages.load(path)


@pytest.mark.parametrize("dtype", ["model", "int4", "int2"])
def test_no_flipped_bit_is_read(kv: CompressedImages, dtype: str, tmp_path: Path) -> None:
    """A file with 200 flipped bits was accepted, and changed three answers of a hundred. Here: each bit of every 29th byte."""
    path = tmp_path / "x.safetensors"
    levels = Levels.fit(kv.kv.repeat(30, 1, 1, 1, 1, 1)) if dtype == "int2" else None
    kv.with_maps(torch.arange(48, dtype=torch.uint8).reshape(3, 16)).as_dtype(dtype, levels).save(path)
    whole = path.read_bytes()
    for where in range(0, len(whole), 29):
        damaged = bytearray(whole)
        damaged[where] ^= 1 << (where % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="x.safetensors: (damaged|not a file of|compressed images of the first)"):
            CompressedImages.load(path)


def test_the_damaged_image_is_named(kv: CompressedImages, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    kv.save(path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(kv.row_bytes()[1]) + 100] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="1 of 3 images do not match their checksums: 1\\)"):
        CompressedImages.load(path)


def test_files_of_the_first_format_are_refused_by_name(tmp_path: Path) -> None:
    """They do not say which adapters and which image processor made them."""
    about = json.dumps({"fingerprint": "0123456789abcdef", "n_visual": 16})
    meta = {"format": "htc-vlm compressed images 1", "about": about}
    save_file({"kv": torch.zeros(1, 1, 2, 1, 1, 2)}, tmp_path / "old.safetensors", metadata=meta)
    with pytest.raises(ValueError, match="old.safetensors: compressed images of the first format.*compress the pictures again"):
        CompressedImages.load(tmp_path / "old.safetensors")


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(kv: CompressedImages, tmp_path: Path) -> None:
    """A traceback after all the work, and a `.partial` file."""
    with pytest.raises(FileNotFoundError) as refused:
        kv.save(tmp_path / "nowhere" / "x.safetensors")
    assert refused.value.filename == str(tmp_path / "nowhere" / "x.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        kv.save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_file_has_the_mode_that_the_umask_says(kv: CompressedImages, tmp_path: Path) -> None:
    """0600: nobody else in the group could read an album."""
    before = os.umask(0o022)
    try:
        kv.save(tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


@torch.no_grad()
def test_images_of_different_counts_stand_in_one_prompt(kv: CompressedImages) -> None:
    """By hand: K = 3, C = 2 and 9. b b b t t b b b t: image at 2, text at 5 and 6, image at 7 + 9 = 16, text at 19."""
    model = shared(VOCO)
    two = CompressedImages(kv.kv[:2], kv.recipe, [2, 9])
    inputs = model._inputs_over_cells(batch([[*[BOTTLENECK] * 3, 5, 6, *[BOTTLENECK] * 3, 7]])["input_ids"], None, two)
    assert inputs["position_ids"].tolist() == [[5, 6, 19]]
    assert inputs["kv_positions"].tolist() == [[2, 3, 4, 16, 17, 18]]


def test_packed_images_count_what_they_store_and_still_answer(kv: CompressedImages) -> None:
    """By hand: 3 x 2 x 2 x 3 x 8 = 288 numbers and 36 scales of 2 bytes; 16 bytes of map; one image."""
    model, prompt = shared(VOCO), batch([[BOTTLENECK] * 3 + [5, 6]])
    levels = Levels.fit(kv.kv.repeat(30, 1, 1, 1, 1, 1))
    stored = {dtype: kv[0].as_dtype(dtype, levels if dtype == "int2" else None) for dtype in ("int8", "int4", "int2")}
    assert {dtype: one.nbytes for dtype, one in stored.items()} == {"int8": 288 + 72, "int4": 144 + 72, "int2": 72}
    assert stored["int4"].with_maps(torch.zeros(1, 16, dtype=torch.uint8)).nbytes == 216 + 16
    with torch.no_grad():
        full = model(**prompt, compressed=kv[0]).logits
        lost = {dtype: float((model(**prompt, compressed=one).logits - full).abs().max()) for dtype, one in stored.items()}
    assert 0 < lost["int8"] < lost["int4"] < 5 and lost["int2"] < 1e-2  # three images and four levels: nothing is lost


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_packed_images_are_cut_joined_saved_and_read(kv: CompressedImages, dtype: str, tmp_path: Path) -> None:
    maps = torch.arange(48, dtype=torch.uint8).reshape(3, 16)
    packed = kv.with_maps(maps).as_dtype(dtype, Levels.fit(kv.kv.repeat(30, 1, 1, 1, 1, 1)) if dtype == "int2" else None)
    packed.save(tmp_path / "x.safetensors")
    again = CompressedImages.load(tmp_path / "x.safetensors")
    assert again.dtype == dtype and again.kv.equal(packed.kv) and again.maps is not None and again.maps.equal(maps)
    joined = CompressedImages.concat([again[2], again[:2]])
    assert joined.kv.equal(packed.kv[[2, 0, 1]]) and joined.maps is not None and joined.maps.equal(maps[[2, 0, 1]])
    assert packed.as_dtype("model").nbytes == 3 * (1152 + 16)
    with pytest.raises(ValueError, match="cannot be put together"):
        CompressedImages.concat([packed, kv])


def test_maps_are_the_attention_of_the_pass_that_compresses() -> None:
    """A byte a patch: the share of the attention, the largest at 255; the entries are those of the pass without."""
    model = shared(VOCO)
    kept = model.compress(pixel_values=pixels(2), maps=True)
    shares = model.bottleneck_attention(pixel_values=pixels(2))[..., :16].mean(dim=(1, 2, 3))
    expected = (255 * shares / shares.amax(1, keepdim=True)).round().to(torch.uint8)
    assert kept.maps is not None and kept.maps.equal(expected) and kept.maps.amax(1).tolist() == [255, 255]
    assert kept.kv.equal(model.compress(pixel_values=pixels(2)).kv)


def test_cells_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="kv must be"):
        CompressedImages(torch.zeros(3, 3), "f", 16)


def test_one_cache_answers_twice(kv: CompressedImages) -> None:
    """A cache object used twice grows, and the second answer continues the first."""
    model, question = shared(VOCO), batch([[5, 6]])
    before = kv.kv.clone()
    answers = [model.generate(**question, compressed=kv[0], max_new_tokens=4, do_sample=False) for _ in range(2)]
    assert answers[0].equal(answers[1]) and kv.kv.equal(before)


@torch.no_grad()
def test_cells_kept_in_half_precision_still_answer(kv: CompressedImages) -> None:
    """Stored as bfloat16 (half the bytes) they are read in the model's own dtype."""
    model, prompt = shared(VOCO), batch([[BOTTLENECK] * 3 + [5, 6]])
    full = model(**prompt, compressed=kv[0]).logits
    half = model(**prompt, compressed=kv[0].to(torch.bfloat16)).logits
    assert half.dtype == full.dtype and 0 < (half - full).abs().max() < 1


QUESTIONS = [[4, 5, 6], [7, 8, 9, 10, 11], [12]]  # left-padded when batched


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"max_cache_len": 40}])
@pytest.mark.parametrize("shares", [False, True])
def test_a_static_cache_answers_as_a_dynamic_one(kv: CompressedImages, options: dict[str, int], shares: bool) -> None:
    """Entries that are reserved but not yet written must not be seen; three images, or one for all, beams included."""
    model, images = shared(VOCO), kv[0] if shares else kv
    given = {**batch(QUESTIONS), "compressed": images, "max_new_tokens": 6, "do_sample": False, **options}
    static = model.generate(**given, cache_implementation="static")
    given.pop("max_cache_len", None)
    dynamic = model.generate(**given)
    assert static.equal(dynamic)
    assert len({tuple(row) for row in dynamic[:, -6:].tolist()}) > 1


@pytest.mark.slow
def test_a_static_cache_decodes_as_one_compiled_graph(kv: CompressedImages) -> None:
    """What a GPU gets: transformers compiles the decoding step. A graph break or a second compilation costs the gain."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    model = build(VOCO)
    given = {**batch(QUESTIONS), "compressed": kv, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**given)
    settings = CompileConfig(backend="eager", fullgraph=True)
    settings.mode, settings._compile_all_devices = None, True  # type: ignore[assignment]
    counters.clear()
    assert model.generate(**given, cache_implementation="static", compile_config=settings).equal(expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_caches_that_cannot_be_are_refused(kv: CompressedImages) -> None:
    """A cache that was asked for and silently not used."""
    model = shared(VOCO)
    with pytest.raises(ValueError, match="cache_implementation is 'quantized'.*'dynamic', 'static'"):
        model.generate(**batch([[5, 6]]), compressed=kv[0], max_new_tokens=2, cache_implementation="quantized")
    with pytest.raises(ValueError, match="reserved at once; give max_new_tokens"):
        model.generate(**batch([[5, 6]]), compressed=kv[0], cache_implementation="static")


def test_questions_about_one_image_share_its_cells(kv: CompressedImages) -> None:
    """A copy per question; and a first pass that writes into what is shared."""
    model, before = shared(VOCO), kv.kv.clone()
    inputs = model._inputs_over_cells(**batch(QUESTIONS), compressed=kv[1])
    layer = inputs["past_key_values"].layers[2]
    assert layer.values.shape == (3, 2, 3, 8)
    assert layer.keys.stride(0) == layer.values.stride(0) == 0
    model.generate(**batch(QUESTIONS), compressed=kv[1], max_new_tokens=3, do_sample=False)
    assert kv.kv.equal(before)
