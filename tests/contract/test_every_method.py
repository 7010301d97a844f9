"""What every method promises, whatever it does to an image (design.md section 3)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from htc_vlm.compressors import COMPRESSORS, Compressor, build
from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration

from .. import tinies
from ..tinies import N_IMAGES, N_LAYERS, N_PATCHES, assert_close, batch, greedy, image_ids, pixels, rows, text_logits
from .conftest import CASES, Case


def entering_lengths(model: HtcVlmForConditionalGeneration, run: Any) -> list[int]:
    """Tokens that entered each decoder layer while `run()` ran, all passes together."""
    layers = list(model.model.language_model.layers)
    lengths = [0] * len(layers)

    def note(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        lengths[layers.index(module)] += (args[0] if args else kwargs["hidden_states"]).shape[1]

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return lengths


def test_the_schedule_is_what_happened(case: Case) -> None:
    """A method that reports fewer tokens than its layers see gets its place in the cost tables for nothing."""
    model, promised = case.model, case.model.model.compressor.schedule(N_PATCHES, N_LAYERS)
    text = [5, 6, 7]
    inputs = batch([[*image_ids(model), *text]])
    seen = entering_lengths(model, lambda: model(**inputs, pixel_values=pixels(1)))
    assert [n - len(text) for n in seen] == promised
    if model.model.compressor.n_bottleneck:
        assert entering_lengths(model, lambda: model.compress(pixel_values=pixels(1))) == promised


def test_the_cache_holds_what_cached_tokens_promises(case: Case) -> None:
    """Patches that stay in the cache after compression make its size a claim, not a fact."""
    model, text = case.model, [5, 6, 7]
    inputs = batch([[*image_ids(model), *text]])
    n_new = 2
    out = model.generate(**inputs, pixel_values=pixels(1), max_new_tokens=n_new, do_sample=False, return_dict_in_generate=True)
    kept = [layer.keys.shape[2] - len(text) - (n_new - 1) for layer in out.past_key_values.layers]
    assert kept == model.model.compressor.cached_tokens(N_PATCHES, N_LAYERS)


def test_another_picture_gives_other_logits(case: Case) -> None:
    """All tests below would pass for a model that never looks at its image."""
    model = case.model
    inputs = batch([[*image_ids(model), 5, 6]])
    (one,), (other,) = (text_logits(model, inputs, pixel_values=pixels(1, seed)) for seed in (1, 2))
    assert (one - other).abs().max() > 0.01


def test_a_batch_gives_what_its_samples_give_alone(case: Case) -> None:
    """Images given to the wrong sample, or masks that leak between rows."""
    model, images = case.model, pixels(3)
    together = text_logits(model, batch(rows(model)), pixel_values=images)
    alone, n_used = [], 0
    for row, n in zip(rows(model), N_IMAGES, strict=True):
        own = images[n_used : n_used + n] if n else None
        alone += text_logits(model, batch([row]), pixel_values=own)
        n_used += n
    assert_close(together, alone)


def test_left_padding_changes_nothing(case: Case) -> None:
    """Padding that is looked at, or counted as a position."""
    model, images = case.model, pixels(3)
    expected = text_logits(model, batch(rows(model)), pixel_values=images)
    assert_close(text_logits(model, batch(rows(model), n_extra=5), pixel_values=images), expected)


def test_right_padding_changes_nothing(case: Case) -> None:
    """The training collator pads on the right; rows that see nothing at all turn into NaN and spread."""
    model, images = case.model, pixels(3)
    prompts = rows(model)
    expected = text_logits(model, batch(prompts), pixel_values=images)
    assert_close(text_logits(model, batch(prompts, n_extra=3, side="right"), pixel_values=images), expected)


def test_a_missing_attention_mask_means_no_padding(case: Case) -> None:
    """transformers may read packed sequences out of the positions where no mask is given."""
    model, prompt = case.model, batch([rows(case.model)[0]])
    expected = text_logits(model, prompt, pixel_values=pixels(2))
    with torch.no_grad():
        logits = model(input_ids=prompt["input_ids"], pixel_values=pixels(2)).logits
    assert_close([logits[tinies.is_text(prompt)]], expected)


def test_no_image_and_two_images_work(case: Case) -> None:
    """A text-only prompt is plain LLaVA, also for a model whose tokens never see patches; two images differ from one."""
    model, image = case.model, image_ids(case.model)
    none = text_logits(model, batch([[5, 6, 7]]))
    plain = text_logits(tinies.shared({"name": "none"}, case.attention), batch([[5, 6, 7]]))
    if case.compressor["name"] == "none":
        assert_close(none, plain, 0)
    two = batch([[*image, 5, *image, 6, 7]])
    same = text_logits(model, two, pixel_values=pixels(1).repeat(2, 1, 1, 1))
    different = text_logits(model, two, pixel_values=pixels(2))
    assert all(bool(torch.isfinite(x).all()) for x in (*none, *same, *different))
    torch.testing.assert_close(same[0][0], different[0][0], atol=tinies.TOLERANCE, rtol=0)  # before the second image
    assert (same[0][-1] - different[0][-1]).abs().max() > 1e-3


def test_cached_generation_equals_full_forward(case: Case) -> None:
    """Positions or masks that are right in the first pass and drift with every cached token."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    expected = greedy(model, inputs, 6, pixel_values=images)
    out = model.generate(**inputs, pixel_values=images, max_new_tokens=6, do_sample=False)
    assert out[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"])
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("case", [case for case in CASES if case.attention == "sdpa"], ids=str)
def test_beams_are_those_of_one_sample(case: Case) -> None:
    """generate repeats what it knows of the images for each beam, and leaves behind what it does not know."""
    model, images, prompts = case.model, pixels(3), rows(case.model)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch(prompts), pixel_values=images, **options)
    assert together.shape[0] == 6
    for i, own in ((0, images[:2]), (2, images[2:])):
        alone = model.generate(**batch([prompts[i]]), pixel_values=own, **options)
        assert alone[:, len(prompts[i]) :].tolist() == together[2 * i : 2 * i + 2, -4:].tolist()


def test_asking_for_attention_maps_changes_nothing(case: Case) -> None:
    """FastV's released code computes other logits once somebody wants to look."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    expected = text_logits(model, inputs, pixel_values=images)
    if case.attention == "eager":
        asked = text_logits(model, inputs, pixel_values=images, output_attentions=True)
        assert_close(asked, expected, 0)
    asked = text_logits(model, inputs, pixel_values=images, output_hidden_states=True)
    assert_close(asked, expected, 0)


def test_the_global_random_state_is_left_alone(case: Case) -> None:
    """A method that seeds the global generator makes the whole training run depend on it."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
    text_logits(model, inputs, pixel_values=images)
    model.generate(**inputs, pixel_values=images, max_new_tokens=2, do_sample=False)
    after = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert before[0].equal(after[0]) and before[1:] == after[1:]


def test_running_twice_gives_the_same(case: Case) -> None:
    """A hidden state that survives a forward pass."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    first = text_logits(model, inputs, pixel_values=images)
    model.generate(**inputs, pixel_values=images, max_new_tokens=2, do_sample=False)
    assert_close(text_logits(model, inputs, pixel_values=images), first, 0)


def test_settings_and_weights_survive_saving(case: Case, tmp_path: Path) -> None:
    """A setting that JSON changes (tuples, defaults) or a weight that is not saved."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    model.save_pretrained(tmp_path)
    config = HtcVlmConfig.from_pretrained(tmp_path)
    method = model.model.compressor
    assert config.compressor == method.to_dict() == model.config.compressor
    assert build(**config.compressor).settings == method.settings
    again = HtcVlmForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=case.attention).eval()
    assert again.recipe() == model.recipe()
    expected = text_logits(model, inputs, pixel_values=images)
    assert_close(text_logits(again, inputs, pixel_values=images), expected, 0)


SDPA_CASES = [case for case in CASES if case.attention == "sdpa"]


@pytest.mark.parametrize("case", SDPA_CASES, ids=str)
def test_sdpa_and_eager_agree(case: Case) -> None:
    """A 4-D bool mask is obeyed by sdpa and nearly ignored by eager, silently."""
    inputs, images = batch(rows(case.model)), pixels(3)
    eager = tinies.shared(case.compressor, "eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    expected = text_logits(eager, inputs, pixel_values=images)
    assert_close(text_logits(case.model, inputs, pixel_values=images), expected)


def keeping_all(settings: dict[str, Any]) -> dict[str, Any] | None:
    """The same method told to keep every patch; None for methods that cannot, or have weights to make tokens with."""
    if COMPRESSORS.get(settings["name"]).setup is not Compressor.setup:
        return None
    for what in ("n_keep", "n_tokens"):
        if what in settings:
            return {**settings, what: N_PATCHES}
    return None


KEEPS_ALL = [(case, keeping_all(case.compressor)) for case in CASES]


@pytest.mark.parametrize(
    ("case", "settings"),
    [(case, settings) for case, settings in KEEPS_ALL if settings is not None],
    ids=lambda value: str(value) if isinstance(value, Case) else "all",
)
def test_keeping_everything_equals_none(case: Case, settings: dict[str, Any]) -> None:
    """A selection that shuffles or re-scales what it keeps."""
    none = tinies.shared({"name": "none"}, case.attention)
    model = tinies.build(settings, case.attention)
    model.load_state_dict(none.state_dict())
    inputs, images = batch(rows(none)), pixels(3)
    expected = text_logits(none, inputs, pixel_values=images)
    assert_close(text_logits(model, inputs, pixel_values=images), expected, 1e-5)
