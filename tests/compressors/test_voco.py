"""VoCo-LLaMA: its defaults, and what all bottleneck methods share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from htc_vlm import compressors
from htc_vlm.compressors import ImageFeatures
from htc_vlm.tokens import TokenLayout


def test_the_defaults_are_the_released_models() -> None:
    """One token, causal among the patches, text after 576 + 1 positions."""
    method = compressors.build("voco")
    assert (method.n_bottleneck, method.positions, method.settings.visual_attention) == (1, "sequential", "causal")
    assert method.n_visual(576) == 576 and method.QUESTION_INDEPENDENT


def test_all_patches_are_read_and_only_the_bottleneck_is_kept() -> None:
    """Each layer reads 576 + 2 once; the cache of a question holds 2."""
    method = compressors.build("voco", n_bottleneck=2)
    assert method.schedule(576, 32) == [578] * 32 and method.cached_tokens(576, 32) == [2] * 32


def test_patches_pass_unchanged() -> None:
    features = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    assert compressors.build("voco").before_llm(ImageFeatures(features, nn.Identity())).equal(features)


def test_visual_attention_reaches_the_mask() -> None:
    """v v b: the second patch sees the first under `causal` only."""
    layout = TokenLayout.from_string("vvb")
    for attention, expected in (("causal", True), ("self", False)):
        mask = compressors.build("voco", visual_attention=attention).visible(layout)
        assert mask is not None and bool(mask[0, 1, 0]) is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bottleneck": 0}, "voco: n_bottleneck is 0"),
        ({"n_bottleneck": 1.0}, "voco: n_bottleneck is 1.0; give a whole number"),
        ({"visual_attention": "full"}, "voco: visual_attention is 'full'; known: self, causal"),
        ({"positions": "none"}, "voco: positions is 'none'; known: sequential, compact"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressors.build("voco", **settings)
