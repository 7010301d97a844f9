"""LLaVA-Mini: the prompt's words read all patches in a few layers of their own; then the image is one token, or a few.

Source:  Zhang et al., ICLR 2025, arXiv:2501.03895; released code at 47da113; docs/specs/baselines.md section 8.
Differs: where paper and code disagree, the code: queries read the tower's features and the projector comes after them
         (`place: after_projector` is the paper's drawing), and the compressed tokens, too, leave the pre-fusion layers
         changed. All words read all images, also words before an image, as in the code. Gradients reach the
         word embeddings through the fusion (there: detached). A prompt without an image is not fused (there: a
         blank picture). The default is the paper's one token (the code's is four).

The words have read all patches before the language model begins, so this is no bottleneck: what the language model
gets depends on the question, and the patches are needed again for the next one. `n_fusion: 0` is the paper's
ablation without pre-fusion: question-independent, and the fair rival of voco and htc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from htc_vlm.compressors.base import COMPRESSORS, Compressor, ImageFeatures, Sizes, budget_tokens, check_choice, check_count

QUERY_STD = 0.02


@dataclass(frozen=True)
class LlavaMiniSettings:
    n_tokens: int = 1  # a square number: 1, 4, 9, ...
    n_fusion: int = 4  # layers of pre-fusion; 0 = the ablation without
    n_heads: int = 8  # of the attention that compresses
    place: str = "before_projector"


@COMPRESSORS.register("llava_mini")
class LlavaMini(Compressor):
    name = "llava_mini"
    Settings = LlavaMiniSettings
    EXAMPLES = (
        {"n_tokens": 4, "n_fusion": 2},
        {},
        {"n_fusion": 1, "place": "after_projector"},
        {"n_tokens": 4, "n_fusion": 0},
    )
    PAPER = "LLaVA-Mini, arXiv:2501.03895"
    VARIANTS = ({"n_fusion": 0},)
    ACTS = "before the LLM"
    QUESTION_INDEPENDENT = False

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """The nearest square number."""
        return {"n_tokens": round(math.sqrt(budget_tokens(cls.name, budget, n_patches))) ** 2}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_tokens", settings.n_tokens)
        check_count(self.name, "n_fusion", settings.n_fusion, at_least=0)
        check_count(self.name, "n_heads", settings.n_heads)
        check_choice(self.name, "place", settings.place, ("before_projector", "after_projector"))
        if math.isqrt(settings.n_tokens) ** 2 != settings.n_tokens:
            raise ValueError(f"llava_mini: n_tokens is {settings.n_tokens}; give a square number (1, 4, 9, ...)")

    def setup(self, sizes: Sizes) -> None:
        width = sizes.vision_width if self.settings.place == "before_projector" else sizes.llm_width
        if width % self.settings.n_heads or width % 4:
            raise ValueError(
                f"llava_mini: the width of the features is {width}; it must be a multiple of 4 and of n_heads, which "
                f"is {self.settings.n_heads}"
            )
        self.query = nn.Parameter(torch.empty(self.settings.n_tokens, width))
        self.norm_query, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, self.settings.n_heads, batch_first=True)
        if self.settings.n_fusion and sizes.new_decoder_layer is None:
            raise ValueError("llava_mini: pre-fusion needs layers of the language model's kind; Sizes has none")
        self.pre_fusion = nn.ModuleList(
            sizes.new_decoder_layer(index) for index in range(self.settings.n_fusion) if sizes.new_decoder_layer
        )

    def init_own_weights(self) -> None:
        nn.init.normal_(self.query, std=QUERY_STD)

    @property
    def n_fusion(self) -> int:
        return int(self.settings.n_fusion)

    @property
    def fusion_layers(self) -> Sequence[nn.Module]:
        return tuple(self.pre_fusion)

    @property
    def question_independent(self) -> bool:
        return self.n_fusion == 0

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_tokens", self.settings.n_tokens, at_most=n_patches)
        return int(self.settings.n_tokens)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        self.n_visual(images.features.shape[1])
        if self.settings.place == "after_projector":
            return self.compress(images.patches)
        return images.project(self.compress(images.features))

    def compress(self, features: Tensor) -> Tensor:
        """(B, P, width) -> (B, C, width): queries and keys know their places in the grid, values do not."""
        n_images, n_patches, width = features.shape
        places = grid_positions(math.isqrt(self.settings.n_tokens), width).to(features.device)
        normed = self.norm_features(features)
        query = self.norm_query(self.query) + places.to(features.dtype)
        key = normed + resized(places, n_patches).to(features.dtype)
        out, _ = self.attention(query.expand(n_images, -1, -1), key, normed, need_weights=False)
        return out


def grid_positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of the column in the first half, of the row in the second.

    >>> [round(x, 4) for x in grid_positions(2, 4)[2].tolist()]        # row 1, column 0: sin 0, cos 0, sin 1, cos 1
    [0.0, 1.0, 0.8415, 0.5403]
    """
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, width / 4)
    one = torch.cat((angle.sin(), angle.cos()), dim=1)
    column, row = one.repeat(side, 1), one.repeat_interleave(side, dim=0)
    return torch.cat((column, row), dim=1).float()


def resized(places: Tensor, n_patches: int) -> Tensor:
    """(side * side, width) -> (n_patches, width), bicubic. One query's place is stretched over all patches, which then
    have no places of their own: so it is in the released code.

    >>> resized(grid_positions(1, 4), 9).round(decimals=4).unique(dim=0).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    side, n_side = math.isqrt(places.shape[0]), math.isqrt(n_patches)
    if n_side * n_side != n_patches:
        raise ValueError(f"llava_mini needs a square patch grid, got {n_patches} patches")
    if side == n_side:
        return places
    grid = places.T.reshape(1, -1, side, side)
    return interpolate(grid, size=(n_side, n_side), mode="bicubic", align_corners=False)[0].flatten(1).T
