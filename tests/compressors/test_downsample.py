"""Downsampling: a shrunk picture through the tower, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig

import htc_vlm
from htc_vlm import compressors


def test_the_tower_reads_the_shrunk_picture(llava: Any, prompts: Any) -> None:
    """2 x 2 patches of 14 pixels: the picture at 28 pixels a side, with interpolated positions."""
    pixels = prompts.pixels[0]
    small = torch.nn.functional.interpolate(pixels, size=(28, 28), mode="bicubic", antialias=True, align_corners=False)
    tower = llava.model.vision_tower
    features = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][:, 1:]
    expected = llava.model.multi_modal_projector(features)
    with htc_vlm.apply(llava, "downsample", n_tokens=4):
        given = llava.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(given[0], expected[0])


def test_a_picture_at_its_own_size_is_the_stock_model(llava: Any, prompts: Any) -> None:
    """The control must cost nothing where nothing is shrunk."""
    plain = llava(**prompts.batch).logits
    with htc_vlm.apply(llava, "downsample", n_tokens=16):
        torch.testing.assert_close(llava(**prompts.batch).logits, plain)


def test_a_siglip_tower_is_shrunk_too(new_llava: Any, prompts: Any) -> None:
    """It has no class token, and interpolates positions as well."""
    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = new_llava(vision_config=siglip.to_dict(), vision_feature_select_strategy="full")
    with htc_vlm.apply(model, "downsample", n_tokens=4) as applied:
        model(**prompts.batch)
    assert applied.schedule == [4] * 6


def test_settings_that_are_no_square_and_other_families_are_refused() -> None:
    """Qwen-VL reads pictures at their own size."""
    with pytest.raises(ValueError, match="n_tokens is 5; give a square number"):
        compressors.build("downsample", n_tokens=5)
    assert compressors.COMPRESSORS.get("downsample").for_budget(0.11, 576, 32) == {"n_tokens": 64}
    from htc_vlm.testing import tiny_model

    with (
        pytest.raises(ValueError, match="shrink it before the processor of Qwen2_5_VL"),
        htc_vlm.apply(tiny_model("qwen2_5_vl")[0], "downsample"),
    ):
        raise AssertionError("entered")
