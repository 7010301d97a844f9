"""src/htc_vlm/train/presets/llava-1.5-7b.yaml at the paper's size, on the meta device: shapes, no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.model.add_compressor import meta_model

PRESET = Path(__file__).parents[2] / "src/htc_vlm/train/presets" / "llava-1.5-7b.yaml"


@pytest.fixture(scope="module")
def preset() -> dict[str, Any]:
    return yaml.safe_load(PRESET.read_text())


@pytest.fixture(scope="module")
def model(preset: dict[str, Any]) -> HtcVlmForConditionalGeneration:
    return meta_model(preset)


def test_nothing_is_in_memory(model: HtcVlmForConditionalGeneration) -> None:
    """7 billion weights would take 28 GB."""
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_the_anchors_have_the_papers_shapes(model: HtcVlmForConditionalGeneration) -> None:
    """Section 4.1: q has 14112 numbers (21 x 21 x 32), W1 is 16384 x 14112, W2 16384 x 16384, 4 anchors of 4096."""
    compressor = model.model.compressor
    assert tuple(compressor.to_anchors.w1.weight.shape) == (16384, 14112)
    assert tuple(compressor.to_anchors.w2.weight.shape) == (16384, 16384)
    code = compressor.encode(torch.empty(1, 3, 336, 336, device="meta"))
    assert tuple(code.shape) == (1, 21, 21, 32) and code[0].numel() == 14112
    assert compressor.settings.n_anchors * model.config.text_config.hidden_size == 4 * 4096
    assert compressor.quantizer.settings.groups == 8
    assert compressor.quantizer.codes_per_group == 2048  # 16384 entries, f16c32g8


def test_an_image_is_580_visual_tokens_and_one_bottleneck(model: HtcVlmForConditionalGeneration) -> None:
    """Section 4.2: 4 anchors and 576 patches, all behind one <voco>."""
    images = model.model.get_image_features(
        patch_features=torch.empty(1, 576, 1024, device="meta"), image_codes=torch.empty(1, 21, 21, 32, device="meta")
    )
    assert [tuple(one.shape) for one in images.pooler_output] == [(580, 4096)]
    compressor = model.model.compressor
    assert (compressor.n_visual(576), compressor.n_bottleneck) == (580, 1)
    assert compressor.schedule(576, 32) == [581] * 32 and compressor.cached_tokens(576, 32) == [1] * 32


def test_the_language_model_and_the_tower_are_llava_1_5_7bs(model: HtcVlmForConditionalGeneration) -> None:
    """Parameter counts of the released checkpoint: 7,063,427,072 without the compressor."""
    compressor = sum(weight.numel() for weight in model.model.compressor.parameters())
    assert sum(weight.numel() for weight in model.parameters()) - compressor == 7_063_427_072
    assert tuple(model.lm_head.weight.shape) == (32064, 4096)
    assert len(model.model.language_model.layers) == 32
    assert model.config.vision_config.image_size == 336 and model.config.vision_config.patch_size == 14


def test_the_preset_names_stages_that_exist(preset: dict[str, Any]) -> None:
    """A key that training does not know would be refused only on the day of the run."""
    from htc_vlm.train import presets

    read = presets.read(PRESET)
    assert list(read["stages"]) == ["align", "instruct", "compress"]
    steps = {name: presets.loop_settings(stage).steps for name, stage in read["stages"].items()}
    assert steps == {"align": 2181, "instruct": 5198, "compress": 2 * 5198}  # 558128 / 256, 665298 / 128, twice that


def test_sizes_that_are_not_known_are_refused(preset: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'llava-hf/llava-1.5-13b-hf', whose sizes are not known here"):
        meta_model({**preset, "base": "llava-hf/llava-1.5-13b-hf"})
    with pytest.raises(ValueError, match="no stage 'tokenizer'; it has: align, instruct, compress"):
        meta_model(preset, stage="tokenizer")
