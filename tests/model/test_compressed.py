"""CompressedImages: indexing, concatenation, files, and the refusal of what is foreign or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from htc_vlm.model import CompressedImages

from ..tinies import BOTTLENECK, batch, build, pixels, shared

VOCO = {"name": "voco", "n_bottleneck": 3}


@pytest.fixture(scope="module")
def kv() -> CompressedImages:
    return shared(VOCO).compress(pixel_values=pixels(3))


def test_cells_are_one_tensor_of_the_promised_shape(kv: CompressedImages) -> None:
    """(N images, layers, 2, kv heads, K, head dim): 3 layers, 2 kv heads of 32 / 4 = 8."""
    assert kv.kv.shape == (3, 3, 2, 2, 3, 8)
    assert len(kv) == 3 and kv.n_bottleneck == 3 and kv.n_visual == 16


def test_nbytes_counts_what_is_stored(kv: CompressedImages) -> None:
    """By hand: 3 layers x keys and values x 2 heads x 3 tokens x 8 numbers x 4 bytes = 1152 per image."""
    assert kv[0].nbytes == 1152 and kv.nbytes == 3 * 1152
    assert kv.to(torch.bfloat16).nbytes == 3 * 576


def test_an_index_gives_compressed_images_again(kv: CompressedImages) -> None:
    """An index that drops a dimension makes kv[0] useless for everything else."""
    assert kv[1].kv.equal(kv.kv[1:2]) and kv[-1].kv.equal(kv.kv[2:])
    assert kv[:2].kv.equal(kv.kv[:2]) and kv[[2, 0]].kv.equal(kv.kv[[2, 0]])
    assert [one.kv.shape[0] for one in kv] == [1, 1, 1]
    assert kv[0].fingerprint == kv.fingerprint
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
        assert (again.fingerprint, again.n_visual) == (one.fingerprint, one.n_visual)
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
    """Cut short by a full disk, a text file of that name, or values that are no numbers."""
    path = tmp_path / "x.safetensors"
    kv.save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"hello, this is no safetensors file" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors: damaged"):
            CompressedImages.load(path)
    broken = CompressedImages(kv.kv.clone().fill_(float("nan")), kv.fingerprint, kv.n_visual)
    broken.save(path)
    with pytest.raises(ValueError, match="not finite"):
        CompressedImages.load(path)


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
    amid = batch([[5, *[BOTTLENECK] * 3, 6]])
    with pytest.raises(ValueError, match="images amid the text need cache_implementation='dynamic'"):
        model.generate(**amid, compressed=kv[0], max_new_tokens=2, cache_implementation="static")


def test_questions_about_one_image_share_its_cells(kv: CompressedImages) -> None:
    """A copy per question; and a first pass that writes into what is shared."""
    model, before = shared(VOCO), kv.kv.clone()
    inputs = model._inputs_over_cells(**batch(QUESTIONS), compressed=kv[1])
    layer = inputs["past_key_values"].layers[2]
    assert layer.values.shape == (3, 2, 3, 8)
    assert layer.keys.stride(0) == layer.values.stride(0) == 0
    model.generate(**batch(QUESTIONS), compressed=kv[1], max_new_tokens=3, do_sample=False)
    assert kv.kv.equal(before)
