"""HtcVlmForConditionalGeneration: what it gives its language model, what it refuses, packed questions, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration

from .. import tinies
from ..tinies import BOTTLENECK, IMAGE, N_PATCHES, TINY_CODE, assert_close, batch, build, image_ids, pixels, shared

HTC = {"name": "htc", "quantizer": TINY_CODE}
VOCO = {"name": "voco"}


# ----------------------------------------------------------------------------------------------------------- image side
@torch.no_grad()
def test_htc_gives_anchors_then_patches() -> None:
    """Eq. 5: V_hy = [v_d; v_1 ... v_N]. The patches must be those of the uncompressed model."""
    model = shared(HTC)
    (tokens,) = model.model.get_image_features(pixel_values=pixels(1)).pooler_output
    features = model.model.vision_features(pixel_values=pixels(1))
    assert tokens.shape == (4 + N_PATCHES, 32)
    torch.testing.assert_close(tokens[4:], model.model.multi_modal_projector(features)[0])


@torch.no_grad()
def test_features_computed_before_give_the_same_tokens() -> None:
    """Training reads the frozen tower's features and the codes from disk."""
    model = shared(HTC)
    features = model.model.vision_features(pixel_values=pixels(2))
    codes = model.model.compressor.encode(model.model.denormalise(pixels(2)))
    expected = torch.stack(model.model.get_image_features(pixel_values=pixels(2)).pooler_output)
    given = model.model.get_image_features(patch_features=features, image_codes=codes).pooler_output
    torch.testing.assert_close(torch.stack(given), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_uncompressed_model_answers_from_features_too() -> None:
    """generate knows pixel_values only; features handed to it were once dropped silently."""
    model = shared({"name": "none"})
    features = model.model.vision_features(pixel_values=pixels(1))
    inputs = batch([[*image_ids(model), 5, 6]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, pixel_values=pixels(1), **options)
    assert model.generate(**inputs, patch_features=features, **options).equal(expected)


def test_pixels_are_denormalised_with_the_numbers_of_the_config() -> None:
    """Anchors read the tower's pixels; with CLIP's mean on a model normalised otherwise they would see other colours."""
    model = build(HTC)
    model.config.image_mean, model.config.image_std = [0.5, 0.25, 0.0], [0.5, 0.25, 1.0]
    given = torch.tensor([[1.0, -1.0, 0.5], [9.0, -9.0, 0.0]]).view(2, 3, 1, 1)
    expected = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 0.0]]).view(2, 3, 1, 1)  # x * std + mean, clamped to [0, 1]
    assert model.model.denormalise(given).equal(expected)


@pytest.mark.parametrize("compressor", [{"name": "none"}, VOCO, HTC], ids=lambda value: value["name"])
@torch.no_grad()
def test_half_precision_works(compressor: dict[str, Any]) -> None:
    """A float32 mask, mean or code among bfloat16 weights stops the model on the first GPU."""
    model, full = build(compressor).to(torch.bfloat16), shared(compressor)
    inputs = batch(tinies.rows(model))
    expected = tinies.text_logits(full, inputs, pixel_values=pixels(3))
    found = tinies.text_logits(model, inputs, pixel_values=pixels(3).to(torch.bfloat16))
    assert all((a - b.float()).abs().mean() < 0.5 for a, b in zip(expected, found, strict=True))
    out = model.generate(**inputs, pixel_values=pixels(3), max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    if model.model.compressor.n_bottleneck:
        assert model.compress(pixel_values=pixels(3)).kv.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------ packed questions
@pytest.mark.parametrize("compressor", [{"name": "none"}, VOCO, {**HTC, "positions": "compact"}], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_questions_give_what_each_gives_alone(compressor: dict[str, Any], attention: str) -> None:
    """Many questions share one image in one sequence; a question that sees another's answer learns to copy."""
    model = shared(compressor, attention)
    image, questions = image_ids(model), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    packed = [*image, *(token for question in questions for token in question)]
    number = [0] * len(image) + [i + 1 for i, question in enumerate(questions) for _ in question]
    out = model(input_ids=torch.tensor([packed]), question_ids=torch.tensor([number]), pixel_values=pixels(1)).logits[0]
    for i, question in enumerate(questions):
        here = torch.tensor(number) == i + 1
        alone = tinies.text_logits(model, batch([[*image, *question]]), pixel_values=pixels(1))
        assert_close([out[here]], alone)


# -------------------------------------------------------------------------------------------------------------- refusals
def test_flash_attention_is_refused_by_name() -> None:
    """Flash attention ignores masks: training would run and teach the model to look at the patches."""
    model = build(VOCO)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    inputs = batch([[*image_ids(model), 5]])
    with pytest.raises(ValueError, match="'flash_attention_2' ignores.*sdpa.*eager"):
        model(**inputs, pixel_values=pixels(1))
    with pytest.raises(ValueError, match="flash_attention_2"):
        model.compress(pixel_values=pixels(1))


def test_images_amid_the_text_refuse_flash_attention() -> None:
    """The same, when the images come from the cache."""
    model = build(VOCO)
    kv = model.compress(pixel_values=pixels(1))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="images amid the text.*put the images first"):
        model(**batch([[4, BOTTLENECK, 5]]), compressed=kv)


def test_missing_bottleneck_tokens_are_refused() -> None:
    """Without its bottleneck token an image is invisible to the text, and the loss still goes down."""
    model = shared(VOCO)
    with pytest.raises(ValueError, match="1 images need 1 bottleneck tokens.*have 0"):
        model(**batch([[*[IMAGE] * N_PATCHES, 5, 6]]), pixel_values=pixels(1))


def test_a_wrong_number_of_placeholders_is_refused() -> None:
    model = shared(VOCO)
    with pytest.raises(ValueError, match="(?i)image"):
        model(**batch([[*[IMAGE] * (N_PATCHES - 1), BOTTLENECK, 5, 6]]), pixel_values=pixels(1))


def test_a_bottleneck_method_without_its_token_is_refused() -> None:
    config = tinies.config(VOCO)
    config.bottleneck_token_id = None
    model = HtcVlmForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="needs config.bottleneck_token_id"):
        model.compress(pixel_values=pixels(1))


def test_a_cache_in_a_masked_pass_is_refused() -> None:
    """The next token would find the patches in the cache, and see them."""
    model = shared(VOCO)
    with pytest.raises(ValueError, match="a masked pass keeps no cache"):
        model(**batch([[*image_ids(model), 5]]), pixel_values=pixels(1), use_cache=True)


def test_compress_is_refused_where_there_is_nothing_to_keep() -> None:
    for name in ("none", "avg_pool"):
        model = shared({"name": name})
        with pytest.raises(ValueError, match=f"'{name}' has no bottleneck"):
            model.compress(pixel_values=pixels(1))
        with pytest.raises(ValueError, match="no bottleneck, so nothing looked at the image"):
            model.bottleneck_attention(pixel_values=pixels(1))


def test_contradictory_inputs_are_refused() -> None:
    """Two sources of images: one of them would be ignored."""
    model = shared(VOCO)
    kv = model.compress(pixel_values=pixels(1))
    inputs = batch([[*image_ids(model), 5]])
    with pytest.raises(ValueError, match="not both"):
        model.generate(**inputs, pixel_values=pixels(1), compressed=kv)
    with pytest.raises(ValueError, match="give input_ids and attention_mask only"):
        model(**inputs, pixel_values=pixels(1), compressed=kv)
    with pytest.raises(ValueError, match="past_key_values cannot be combined"):
        model.generate(**inputs, compressed=kv, past_key_values=object())
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(compressed=kv)
    features = model.model.vision_features(pixel_values=pixels(1))
    with pytest.raises(ValueError, match="pixel_values or patch_features, not both"):
        model(**inputs, pixel_values=pixels(1), patch_features=features)


def test_anchors_without_pixels_or_codes_are_refused() -> None:
    model = shared(HTC)
    features = model.model.vision_features(pixel_values=pixels(1))
    with pytest.raises(ValueError, match="htc needs the pixels"):
        model.model.get_image_features(patch_features=features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compressor": {"name": "vocco"}}, "unknown compressor 'vocco'; known:.*voco"),
        ({"compressor": {"name": "voco", "n_botleneck": 2}}, "voco has no setting 'n_botleneck'; known: n_bottleneck"),
        ({"compressor": {"n_bottleneck": 2}}, "compressor needs a 'name'"),
        ({"compressor": VOCO, "bottleneck_token_id": 40}, "bottleneck_token_id is 40, the vocabulary has 40"),
        ({"compressor": VOCO, "bottleneck_token_id": IMAGE}, "are both 38"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], message: str) -> None:
    """A setting with a typing error would train the default instead."""
    with pytest.raises(ValueError, match=message):
        HtcVlmConfig(vision_config=tinies.vision_config(), text_config=tinies.text_config(), image_token_index=IMAGE, **options)


# ----------------------------------------------------------------------------------------------------------- recipe
@torch.no_grad()
def test_the_recipe_changes_with_weights_and_settings_and_nothing_else(tmp_path: Path) -> None:
    """Cells of another model are numbers of the right shape; only the recipe tells."""
    model = build(VOCO)
    recipe = model.recipe().digest
    assert build(VOCO).recipe().digest == recipe
    assert build(VOCO, "eager").recipe().digest == recipe
    assert build({**VOCO, "visual_attention": "self"}).recipe().digest != recipe
    model.save_pretrained(tmp_path)
    half = HtcVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.recipe().digest == recipe  # weights are compared as bfloat16
    model.lm_head.weight[0, 0] += 1
    assert model.recipe().digest != recipe
    model.lm_head.weight[0, 0] -= 1
    model.model.language_model.embed_tokens.weight.mul_(1.5)
    assert model.recipe().digest != recipe


def test_weights_are_saved_under_the_names_in_memory(tmp_path: Path) -> None:
    """Trainer resumes with load_state_dict(strict=False): under the hub's names it would go on from random weights."""
    from safetensors.torch import load_file

    model = build(VOCO)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    again = HtcVlmForConditionalGeneration.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
