"""A second quantizer is one class: htc reads it by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from htc_vlm.quantizers import QUANTIZERS, Quantizer
from htc_vlm.train.train_quantizer import TokenizerTraining, train_tokenizer

from .. import tinies


@dataclass(frozen=True)
class Code:
    latents: Tensor
    quantized: Tensor


class BlockMeans(Quantizer):
    """The mean colour of each block, rounded to so many levels."""

    name = "block_means"
    PRESETS = {"coarse": {"block": 16, "levels": 64}}

    def __init__(self, block: int, levels: int = 8) -> None:
        super().__init__()
        self.block, self.levels = block, levels

    @classmethod
    def pixels_per_cell(cls, **options: Any) -> int:
        return int(options["block"])

    @property
    def channels(self) -> int:
        return 3

    def encode(self, pixels: Tensor) -> Code:
        latents = avg_pool2d(pixels, self.block)
        return Code(latents, (latents * self.levels).round() / self.levels)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    QUANTIZERS.register("block_means")(BlockMeans)
    yield
    del QUANTIZERS._classes["block_means"]


@torch.no_grad()
@pytest.mark.parametrize("channels", ["hybrid", "discrete"])
def test_htc_runs_on_another_quantizer(channels: str) -> None:
    """32 x 32 pixels in blocks of 16: 2 x 2 cells. htc once knew MGVQ's arguments and attributes by heart."""
    quantizer = {"name": "block_means", "preset": "coarse", "image_size": 32}
    model = tinies.build({"name": "htc", "channels": channels, "quantizer": quantizer})
    compressor = model.model.compressor
    assert compressor.n_visual(tinies.N_PATCHES) == (4 if channels == "discrete" else tinies.N_PATCHES + 4)
    inputs = tinies.batch([[*tinies.image_ids(model), 5, 6]])
    one, other = (model(**inputs, pixel_values=tinies.pixels(1, seed)).logits for seed in (1, 2))
    assert bool(torch.isfinite(one).all()) and (one - other).abs().max() > 1e-3


def test_one_without_weights_cannot_be_trained(tmp_path: Path) -> None:
    """The tokenizer stage trained MGVQ, whatever it was told."""
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="quantizer block_means cannot be trained: it has no preset"):
        train_tokenizer(pictures, TokenizerTraining(quantizer="block_means", crop=0), tmp_path)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        ({"name": "nobody"}, "htc: unknown quantizer 'nobody'; known: .*block_means.*mgvq"),
        ({"name": "block_means", "preset": "fine"}, "htc: quantizer preset is 'fine'; known: coarse"),
        ({"name": "block_means", "blocks": 2}, "htc: quantizer block_means has no option 'blocks'; known: block, levels"),
    ],
)
def test_a_wrong_quantizer_is_refused_by_name(quantizer: dict[str, Any], message: str) -> None:
    """It came as a TypeError from inside a constructor."""
    with pytest.raises(ValueError, match=message):
        tinies.build({"name": "htc", "quantizer": {**quantizer, "image_size": 32}})
