"""VisionZip, ToMe and DivPrune against outputs recorded from their released code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

import htc_vlm
from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration
from htc_vlm.ops.select import keep_diverse

GOLDEN = Path(__file__).parents[1] / "golden" / "official"
TOLERANCE = 2e-4


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def model_of(s: dict[str, Any], golden: dict[str, Tensor]) -> HtcVlmForConditionalGeneration:
    """A LLaVA with the recorded CLIP tower, whose projector hands its features on."""
    clip = CLIPVisionConfig(**s["clip"])
    text = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    side = clip.image_size // clip.patch_size
    model = HtcVlmForConditionalGeneration(
        HtcVlmConfig(vision_config=clip, text_config=text, image_token_index=7, image_seq_length=side * side)
    ).eval()
    for name, weight in model.model.vision_tower.named_parameters():
        bare = re.sub(r"^vision_model\.", "", name)
        bare = re.sub(r"^encoder\.layers\.(\d+)", lambda found: f"block{int(found[1]) % s['block_sets']}", bare)
        with torch.no_grad():
            weight.copy_(golden[f"weights.{bare}"])
    model.model.multi_modal_projector = nn.Identity()
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["vz_small", "vz_pub64"])
def test_visionzip_keeps_and_merges_what_the_released_code_does(name: str) -> None:
    """Dominant patches by the class token's attention in the layer that the features come from, others merged by keys."""
    s, golden = read(name)
    model = model_of(s, golden)
    with htc_vlm.apply(model, "visionzip", n_dominant=s["n_dominant"], n_contextual=s["n_contextual"]):
        tokens = torch.stack(list(model.model.get_image_features(pixel_values=golden["pixels"].float()).pooler_output))
    torch.testing.assert_close(tokens, golden["tokens"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tome_small", "tome_pub64"])
def test_tome_merges_what_the_released_code_merges(name: str) -> None:
    """Pairs by keys, sizes in the softmax, size-weighted means, block after block."""
    s, golden = read(name)
    model = model_of(s, golden)
    with htc_vlm.apply(model, "tome", merges=tuple(golden["merges"].tolist())) as applied:
        tokens = torch.stack(list(model.model.get_image_features(pixel_values=golden["pixels"].float()).pooler_output))
        source = applied.source
    torch.testing.assert_close(tokens, golden["tokens"], atol=TOLERANCE, rtol=0)
    assert source.argmax(dim=1).equal(golden["group_of_patch"].long())


@pytest.mark.parametrize("name", ["one", "clusters", "dup", "0.098", "batch0"])
def test_divprune_keeps_what_the_released_code_keeps(name: str) -> None:
    """Where patches are equal the released code picks one of them again and again (`dup`): there we go on with others."""
    s, golden = read("divprune")
    kept = keep_diverse(golden[f"{name}.x"].float()[None], s[name]["n_keep"])[0].tolist()
    official = set(golden[f"{name}.order"].tolist())
    assert len(set(kept)) == s[name]["n_keep"]
    assert official == set(kept) if not s[name]["picked_twice"] else official < set(kept)
