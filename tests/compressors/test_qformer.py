"""The Q-Former: n queries that read the tower's features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from htc_vlm import compressors
from htc_vlm.compressors import Compressor, ImageFeatures, Sizes

SMALL = {"n_queries": 3, "n_layers": 2, "width": 16, "n_heads": 2}


def qformer(**settings: Any) -> Compressor:
    torch.manual_seed(0)
    method = compressors.build("qformer", **{**SMALL, **settings})
    method.setup(Sizes(n_patches=16, vision_width=6, llm_width=5, initializer_range=0.5))
    method.init_own_weights()
    return method.eval()


def features(n: int = 2) -> ImageFeatures:
    return ImageFeatures(torch.randn(n, 16, 6, generator=torch.Generator().manual_seed(1)), nn.Identity())


@torch.no_grad()
def test_n_queries_give_n_tokens_of_the_language_models_width() -> None:
    assert qformer().before_llm(features()).shape == (2, 3, 5)
    assert qformer(n_queries=1).n_visual(576) == 1


@torch.no_grad()
def test_queries_read_the_image_and_differ() -> None:
    """Without cross-attention every image gives the same tokens; with equal queries every token is the same."""
    out = qformer().before_llm(features())
    assert (out[0] - out[1]).abs().max() > 1e-4
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-4


@torch.no_grad()
def test_the_order_of_patches_does_not_matter() -> None:
    """Cross-attention is a set operation: places come from the tower's own position embedding."""
    given = features()
    turned = ImageFeatures(given.features.flip(1), given.project)
    method = qformer()
    torch.testing.assert_close(method.before_llm(turned), method.before_llm(given), atol=1e-5, rtol=0)


@torch.enable_grad()  # off in this folder, see conftest.py
def test_everything_in_it_learns() -> None:
    """Text parts of BLIP-2's module that nothing uses would break DDP and inflate the parameter count."""
    method = qformer()
    method.before_llm(features()).square().sum().backward()
    silent = [name for name, parameter in method.named_parameters() if parameter.grad is None]
    assert silent == []


def test_the_defaults_are_blip_2s() -> None:
    """12 layers of 768 with cross-attention in every second one; one query as in VoCo-LLaMA's comparison."""
    settings = compressors.build("qformer").settings
    assert (settings.n_layers, settings.width, settings.n_heads) == (12, 768, 12)
    assert (settings.cross_attention_frequency, settings.n_queries) == (2, 1)


@pytest.mark.parametrize("what", ["n_queries", "n_layers", "width", "n_heads", "cross_attention_frequency"])
def test_counts_below_one_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match=f"qformer: {what} is 0"):
        compressors.build("qformer", **{what: 0})
