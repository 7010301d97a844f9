"""What bottleneck methods promise besides: the one masked pass of training equals compress-then-ask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from htc_vlm.compressors import build
from htc_vlm.model import HtcVlmForConditionalGeneration

from .. import tinies
from ..tinies import BOTTLENECK, TINY_CODE, assert_close, batch, image_ids, pixels, rows, shared, text_logits
from .conftest import BACKENDS, own

METHODS: dict[str, dict[str, Any]] = {"voco": {}, "htc": {"quantizer": TINY_CODE}}
READERS: dict[str, dict[str, Any]] = {"readers": {"n_readers": 2}}  # no masked pass of one sequence to look into
SWEEP = [
    ({"name": name, **options, "n_bottleneck": k, "positions": positions, "visual_attention": attention}, backend)
    for (name, options), (k, backend), positions, attention in itertools.product(
        (METHODS | READERS).items(), ((1, "sdpa"), (3, "sdpa"), (3, "eager")), ("sequential", "compact"), ("self", "causal")
    )
]
ON_SDPA = [pair for pair in SWEEP if pair[1] == "sdpa"]
MASKED = [pair for pair in ON_SDPA if pair[0]["name"] in METHODS]


SELF = [
    {**compressor, "visual_attention": "self"} for compressor in own() if build(**compressor).n_bottleneck
]  # each method with a bottleneck and each of its examples, as the fast compress path takes them


def label(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['name']}-{value['n_bottleneck']}-{value['positions']}-{value['visual_attention']}"
    return str(value)


@pytest.fixture(params=SWEEP, ids=lambda pair: f"{label(pair[0])}-{pair[1]}")
def model(request: pytest.FixtureRequest) -> HtcVlmForConditionalGeneration:
    compressor, backend = request.param
    return shared(compressor, backend)


@pytest.fixture(params=MASKED, ids=lambda pair: f"{label(pair[0])}-{pair[1]}")
def masked(request: pytest.FixtureRequest) -> HtcVlmForConditionalGeneration:
    compressor, backend = request.param
    return shared(compressor, backend)


@torch.no_grad()
def test_one_pass_equals_two_passes(model: HtcVlmForConditionalGeneration) -> None:
    """Training would teach one model and inference run another. Batch of 3; 2, 0 and 1 images; some amid the text."""
    inputs, images = batch(rows(model)), pixels(3)
    one = text_logits(model, inputs, pixel_values=images)
    two = model(**inputs, compressed=model.compress(pixel_values=images)).logits
    assert_close([row[-len(text) :] for row, text in zip(two, one, strict=True)], one)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n_bottleneck", [64, 128, 192])
def test_the_budgets_of_table_2_hold_the_same_promises(name: str, n_bottleneck: int) -> None:
    """More bottleneck tokens than patches, here: they see each other causally, and all of them reach the text."""
    compressor = {"name": name, **METHODS[name], "n_bottleneck": n_bottleneck}
    models = [shared(compressor, backend) for backend in ("sdpa", "eager")]
    inputs, images = batch(rows(models[0])), pixels(3)
    one, eager = (text_logits(model, inputs, pixel_values=images) for model in models)
    assert_close(eager, one)
    kv = models[0].compress(pixel_values=images)
    assert kv.n_bottleneck == n_bottleneck
    two = models[0](**inputs, compressed=kv).logits
    assert_close([row[-len(text) :] for row, text in zip(two, one, strict=True)], one)
    n_visual = models[0].model.compressor.n_visual(tinies.N_PATCHES)
    assert models[0].model.compressor.schedule(tinies.N_PATCHES, 3) == [n_visual + n_bottleneck] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compressor", SELF, ids=lambda one: str({**one, "quantizer": None}))
def test_the_fast_path_gives_the_cells_of_the_masked_pass(compressor: dict[str, Any], backend: str) -> None:
    """Cells from a short cut that leaves out something the bottleneck saw in training. Every example, batch of 3."""
    model, images = shared(compressor, backend), pixels(3)
    fast, general = (model.compress(pixel_values=images, path=path).kv for path in ("fast", "general"))
    torch.testing.assert_close(fast, general, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_stored_image_can_stand_anywhere(model: HtcVlmForConditionalGeneration) -> None:
    """Cells that depend on what stood around the image when it was compressed, or on its place."""
    image = image_ids(model)
    kv = model.compress(pixel_values=pixels(3))
    for order in ([2, 0], [1, 1]):
        inputs = batch([[4, 5, 6, *image, 7, *image, 8, 9]])
        one = text_logits(model, inputs, pixel_values=pixels(3)[order])
        two = model(**inputs, compressed=kv[order]).logits
        assert_close([two[0]], one)


@torch.no_grad()
@pytest.mark.parametrize("model", ON_SDPA, indirect=True, ids=lambda pair: label(pair[0]))
def test_prompts_may_leave_out_the_visual_placeholders(model: HtcVlmForConditionalGeneration) -> None:
    """A prompt answered from the cache needs no 576 placeholders; it must mean the same with and without them."""
    n_bottleneck = model.model.compressor.n_bottleneck
    kv = model.compress(pixel_values=pixels(1))
    full = batch([[4, *image_ids(model), 7, 8]])
    short = batch([[4, *[BOTTLENECK] * n_bottleneck, 7, 8]])
    assert model(**full, compressed=kv).logits.equal(model(**short, compressed=kv).logits)


@torch.no_grad()
def test_bottleneck_attention_is_what_the_masked_pass_attended(masked: HtcVlmForConditionalGeneration) -> None:
    """A heatmap of something else than what the answers were computed from."""
    eager = shared(masked.config.compressor, "eager")
    n_image, n_bottleneck = len(image_ids(masked)), masked.model.compressor.n_bottleneck
    inputs = batch([[*image_ids(masked), 5, 6]])
    before = masked.compress(pixel_values=pixels(1)).kv
    shown = masked.bottleneck_attention(pixel_values=pixels(1))  # (1, layers, H, K, C + K)
    assert masked.compress(pixel_values=pixels(1)).kv.equal(before)
    maps = eager(**inputs, pixel_values=pixels(1), output_attentions=True).attentions
    expected = torch.stack([layer[0, :, n_image - n_bottleneck : n_image, :n_image] for layer in maps])
    torch.testing.assert_close(shown[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_reaches_the_image_only_through_the_bottleneck(masked: HtcVlmForConditionalGeneration) -> None:
    """A mask that lets text look at patches: the bottleneck would learn nothing and the cache would answer nonsense."""
    eager = shared(masked.config.compressor, "eager")
    inputs = batch([[4, *image_ids(masked), 5, 6]])
    n_visual = masked.model.compressor.n_visual(tinies.N_PATCHES)
    maps = eager(**inputs, pixel_values=pixels(1), output_attentions=True).attentions
    for layer in maps:
        assert layer[0, :, -2:, 1 : 1 + n_visual].max() == 0  # text -> visual
        assert layer[0, :, 1 : 1 + len(image_ids(masked)), 0].max() == 0  # image -> text before it
        assert layer[0, :, -1, 1 + n_visual].min() > 0  # text -> bottleneck
