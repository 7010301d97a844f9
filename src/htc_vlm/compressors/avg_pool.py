"""Average pooling: n tokens, each the mean of one cell of the patch grid.

Source:  VoCo-LLaMA Table 1 "Avg. Pool + Linear"; LLaMA-VID (b3d3ae2) `compress_type: mean`, its content token.
Differs: general n by adaptive pooling on the grid (as in Matryoshka Multimodal Models); LLaMA-VID's
         text-conditioned context token is left out; pooling after the projector is a switch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from htc_vlm.compressors.base import COMPRESSORS, Compressor, ImageFeatures, budget_tokens, check_choice, check_count


@dataclass(frozen=True)
class AvgPoolSettings:
    n_tokens: int = 1  # a square number: 1, 4, 9, ...
    place: str = "before_projector"


@COMPRESSORS.register("avg_pool")
class AvgPool(Compressor):
    name = "avg_pool"
    Settings = AvgPoolSettings
    EXAMPLES = ({"n_tokens": 4}, {"n_tokens": 1, "place": "after_projector"}, {"n_tokens": 1})
    PAPER = "VoCo-LLaMA, arXiv:2406.12275 (baseline)"
    ACTS = "before the LLM"
    TRAINED = False
    NEEDS_GRID = True

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """The nearest square number."""
        return {"n_tokens": round(math.sqrt(budget_tokens(cls.name, budget, n_patches))) ** 2}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_tokens", settings.n_tokens)
        check_choice(self.name, "place", settings.place, ("before_projector", "after_projector"))
        if math.isqrt(settings.n_tokens) ** 2 != settings.n_tokens:
            raise ValueError(f"avg_pool: n_tokens is {settings.n_tokens}; give a square number (1, 4, 9, ...)")

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_tokens", self.settings.n_tokens, at_most=n_patches)
        return int(self.settings.n_tokens)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        self.n_visual(images.features.shape[1])
        if self.settings.place == "after_projector":
            return self._pool(images.patches, images.grid)
        return images.project(self._pool(images.features, images.grid))

    def source(self, images: ImageFeatures) -> Tensor:
        n_images, n_patches, _ = images.features.shape
        identity = torch.eye(n_patches, device=images.features.device)
        return (self._pool(identity[None], images.grid) > 0).float().expand(n_images, -1, -1)

    def _pool(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """(B, P, width) -> (B, n_tokens, width)"""
        n_images, n_patches, width = tokens.shape
        side, n_side = math.isqrt(n_patches), math.isqrt(self.settings.n_tokens)
        if grid is None and side * side != n_patches:
            raise ValueError(f"avg_pool needs a square patch grid, got {n_patches} patches")
        rows, columns = (side, side) if grid is None else grid
        if n_side > min(rows, columns):
            raise ValueError(
                f"avg_pool: n_tokens={self.settings.n_tokens} are {n_side} x {n_side} cells, the picture has {rows} x "
                f"{columns} patches; give at most {min(rows, columns) ** 2}"
            )
        laid_out = tokens.transpose(1, 2).reshape(n_images, width, rows, columns)
        return adaptive_avg_pool2d(laid_out, n_side).flatten(2).transpose(1, 2)
