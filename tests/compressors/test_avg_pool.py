"""Average pooling of the patch grid, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from htc_vlm import compressors
from htc_vlm.compressors import ImageFeatures

GRID = torch.arange(16.0).reshape(1, 16, 1)  # 4 x 4 patches in raster order: 0 1 2 3 / 4 5 6 7 / ...


def test_each_token_is_the_mean_of_one_cell_of_the_grid() -> None:
    """Pooling runs of the raster instead of squares mixes left and right. (0 + 1 + 4 + 5) / 4 = 2.5, ..."""
    out = compressors.build("avg_pool", n_tokens=4).before_llm(ImageFeatures(GRID, nn.Identity()))
    assert out.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    out = compressors.build("avg_pool").before_llm(ImageFeatures(GRID, nn.Identity()))
    assert out.flatten().tolist() == [7.5]


def test_the_place_decides_whether_the_mean_is_projected_or_the_projected_averaged() -> None:
    """With a projector that squares: mean then square 7.5 ** 2 = 56.25, square then mean 1240 / 16 = 77.5."""
    images = ImageFeatures(GRID, torch.square)
    assert compressors.build("avg_pool").before_llm(images).item() == 56.25
    assert compressors.build("avg_pool", place="after_projector").before_llm(images).item() == 77.5


def test_grids_that_do_not_divide_evenly_are_pooled_adaptively() -> None:
    """24 x 24 patches to 5 x 5: every patch counts, overlapping cells as in PyTorch's adaptive pooling."""
    features = torch.ones(2, 576, 3)
    out = compressors.build("avg_pool", n_tokens=25).before_llm(ImageFeatures(features, nn.Identity()))
    assert out.shape == (2, 25, 3) and out.eq(1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_tokens": 3}, "n_tokens is 3; give a square number"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"n_tokens": True}, "n_tokens is True"),
        ({"place": "inside"}, "place is 'inside'; known: before_projector, after_projector"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressors.build("avg_pool", **settings)


def test_more_tokens_than_patches_and_grids_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="n_tokens is 25; there are only 16"):
        compressors.build("avg_pool", n_tokens=25).before_llm(ImageFeatures(GRID, nn.Identity()))
    with pytest.raises(ValueError, match="square patch grid, got 15"):
        compressors.build("avg_pool").before_llm(ImageFeatures(GRID[:, :15], nn.Identity()))
