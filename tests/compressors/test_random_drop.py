"""Random drop: a subset that depends on the seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from htc_vlm import compressors
from htc_vlm.compressors import ImageFeatures

FEATURES = torch.arange(16.0).reshape(1, 16, 1).repeat(2, 1, 1)


def kept(**settings: int) -> list[float]:
    out = compressors.build("random_drop", **settings).before_llm(ImageFeatures(FEATURES, nn.Identity()))
    assert out[0].equal(out[1])  # the same places in every picture
    return out[0, :, 0].tolist()


def test_the_patches_kept_are_different_ones_in_raster_order() -> None:
    """Order carries position: a shuffled image is another control than a thinned one."""
    for seed in range(20):
        places = kept(n_keep=5, seed=seed)
        assert places == sorted(set(places)) and len(places) == 5


def test_the_seed_decides() -> None:
    assert kept(n_keep=5, seed=1) == kept(n_keep=5, seed=1)
    assert len({tuple(kept(n_keep=5, seed=seed)) for seed in range(10)}) > 5


def test_every_patch_may_be_kept() -> None:
    """A range that starts at 1 or ends early would always drop the same corner."""
    assert {place for seed in range(40) for place in kept(n_keep=3, seed=seed)} == set(range(16))


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="n_keep is 17; there are only 16"):
        kept(n_keep=17)
