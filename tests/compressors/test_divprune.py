"""DivPrune as a compressor: what it keeps, and what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from htc_vlm import compressors
from htc_vlm.compressors import ImageFeatures


def test_selection_looks_at_projected_features() -> None:
    """The released code compares what the language model receives; before the projector other patches would win."""
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.5], [0.0, 1.0]]])

    def project(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, -4.0])  # directions: 0, -66 and -90 degrees instead of 0, 29 and 90

    out = compressors.build("divprune", n_keep=2).before_llm(ImageFeatures(features, project))
    assert torch.equal(out, project(features)[:, [0, 2]])
    out = compressors.build("divprune", n_keep=1).before_llm(ImageFeatures(features, project))
    assert torch.equal(out, project(features)[:, [0]])


def test_keeping_every_patch_changes_nothing() -> None:
    """The mildest setting must be bit-identical to no method."""
    features = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    images = ImageFeatures(features, nn.Identity())
    assert torch.equal(compressors.build("divprune", n_keep=9).before_llm(images), features)


@pytest.mark.parametrize("n_keep", [192, 128, 64])
def test_the_budget_is_the_number_of_tokens_in_every_layer(n_keep: int) -> None:
    """Pre-LLM methods have the same count in every layer."""
    assert compressors.build("divprune", n_keep=n_keep).schedule(576, 32) == [n_keep] * 32


def test_more_tokens_than_patches_are_refused_by_name() -> None:
    """A slice would clip, and the table would show a budget that was not used."""
    with pytest.raises(ValueError, match="divprune: n_keep is 101; there are only 100"):
        compressors.build("divprune", n_keep=101).schedule(100, 8)
    with pytest.raises(ValueError, match="divprune: n_keep is 0"):
        compressors.build("divprune", n_keep=0)
