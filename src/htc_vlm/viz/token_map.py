"""Which patch went into which token: a picture per stage, from what `htc_vlm.apply` has recorded.

Source:  Token Merging (Bolya et al., ICLR 2023), Figure 4: the patches of one token share a colour; the dropped patches
         of FastV and SparseVLM, shaded as in those papers' figures.
Differs: one form for all methods. A patch that is a token of its own is left as it is; patches that were merged share a
         colour and a frame; patches that no token holds are dark.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from htc_vlm.applied.apply import apply
from htc_vlm.files import save_figure
from htc_vlm.model.answering import Answerer
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration, check_llava
from htc_vlm.model.processing import HtcVlmProcessor

GOLDEN = 0.618034  # of the colour circle: neighbours in number are far apart in colour
TINT, SHADE = 0.5, 0.72  # how much of a merged patch is its colour, of a dropped one darkness
DARK = (24, 26, 32)
SIDE_PIXELS = 384


@dataclass(frozen=True)
class Stage:
    """The tokens of one image that enter layers `first_layer` to `last_layer`. source (C, P)."""

    first_layer: int
    last_layer: int
    source: Tensor

    @property
    def title(self) -> str:
        """
        >>> Stage(2, 5, torch.eye(4)[:3]).title
        'layers 2 to 5: 3 tokens from 3 patches'
        """
        layers = f"layers {self.first_layer} to {self.last_layer}"
        if self.first_layer == self.last_layer:
            layers = f"layer {self.first_layer}"
        n_held = int((self.source > 0).any(dim=0).sum())
        return f"{layers}: {self.source.shape[0]} tokens from {n_held} patches"


@dataclass(frozen=True)
class Groups:
    """token (P,): the number of the token that holds most of each patch, -1 for none. is_merged (P,): not alone in it."""

    token: Tensor
    is_merged: Tensor


def groups(source: Tensor) -> Groups:
    """source (C, P), shares or 0 and 1 -> what becomes of each patch.

    >>> found = groups(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]]))
    >>> found.token.tolist(), found.is_merged.tolist()
    ([1, 0, 1, -1], [True, False, True, False])
    """
    share, token = source.max(dim=0)
    is_held = share > 0
    token = token.masked_fill(~is_held, -1)
    n_patches = torch.bincount(token[is_held], minlength=source.shape[0])  # (C,)
    return Groups(token, is_held & (n_patches[token.clamp(min=0)] > 1))


def colour_of(number: int) -> tuple[int, int, int]:
    """A bright colour for a token, always the same for the same number."""
    red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN % 1.0, 0.85 if number % 2 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(picture: Image.Image, source: Tensor, side_pixels: int = SIDE_PIXELS) -> Image.Image:
    """The square picture that the model saw, with what became of each patch; source (C, P), patches by rows.

    ValueError where the patches are no square grid.
    """
    side = math.isqrt(source.shape[1])
    if side * side != source.shape[1]:
        raise ValueError(f"{source.shape[1]} patches are no square grid; there is nothing to lay over a picture")
    found = groups(source.float().cpu())
    cell = max(side_pixels // side, 1)
    pixels = np.asarray(picture.convert("RGB").resize((cell * side,) * 2, Image.Resampling.BICUBIC), dtype=np.float32).copy()
    for patch, (token, is_merged) in enumerate(zip(found.token.tolist(), found.is_merged.tolist(), strict=True)):
        row, column = divmod(patch, side)
        here = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        if token < 0:
            here[:] = (1 - SHADE) * here.mean(axis=-1, keepdims=True) + SHADE * np.array(DARK, dtype=np.float32)
        elif is_merged:
            here[:] = (1 - TINT) * here + TINT * np.array(colour_of(token), dtype=np.float32)
    drawn = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    _frame(ImageDraw.Draw(drawn), found, side, cell)
    return drawn


def _frame(draw: ImageDraw.ImageDraw, found: Groups, side: int, cell: int) -> None:
    """Lines between patches of different tokens, at the outside too; none between two dropped ones."""
    token = torch.full((side + 2, side + 2), -1)
    token[1:-1, 1:-1] = found.token.view(side, side)
    width = max(cell // 24, 1)
    for row in range(side + 1):
        for column in range(side + 1):
            here, right, below = (int(token[row + i, column + j]) for i, j in ((0, 0), (0, 1), (1, 0)))
            x, y = column * cell, row * cell  # the lower right corner of `here`
            if row and here != right:
                draw.line((x, y - cell, x, y), fill="white", width=width)
            if column and here != below:
                draw.line((x - cell, y, x, y), fill="white", width=width)


def stages(sources: Mapping[int, Tensor], n_layers: int, image: int = 0) -> list[Stage]:
    """`Applied.sources` -> one stage per change, of one image. ValueError where nothing was recorded.

    >>> [stage.title for stage in stages({0: torch.eye(4)[None], 2: torch.eye(4)[None, :2]}, n_layers=6)]
    ['layers 0 to 1: 4 tokens from 4 patches', 'layers 2 to 5: 2 tokens from 2 patches']
    """
    if not sources:
        raise ValueError("no sources were recorded: the method does not say which patches its tokens hold")
    starts = sorted(sources)
    ends = [*starts[1:], n_layers]
    return [Stage(first, end - 1, sources[first][image]) for first, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def record(
    model: HtcVlmForConditionalGeneration,
    processor: HtcVlmProcessor,
    picture: Image.Image,
    question: str,
    method: str,
    settings: Mapping[str, Any],
) -> list[Stage]:
    """Ask once with the method applied; what became of the patches. The question matters to methods that read it."""
    check_llava(model, "a map of tokens")
    answerer = Answerer(model, processor, keep_pixels=True)
    inputs = answerer.inputs([question], is_compressed=False)
    with apply(model, method, **settings) as applied:
        model(**inputs, pixel_values=answerer.encode([picture]))
        return stages(applied.sources, applied.n_layers)


def draw(picture: Image.Image, found: list[Stage], title: str, file: str | Path) -> None:
    """The picture, and beside it a panel per stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [stage for stage in found if stage.first_layer or len(found) == 1]  # before the first drop all are there
    figure, axes = plt.subplots(1, 1 + len(shown), figsize=(3.1 * (1 + len(shown)), 3.5), squeeze=False, layout="constrained")
    axes[0, 0].imshow(picture.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC))
    n_patches = found[0].source.shape[1]
    axes[0, 0].set_title(f"{n_patches} patches", fontsize=9)
    for axis, stage in zip(axes[0, 1:], shown, strict=True):
        axis.imshow(overlay(picture, stage.source))
        axis.set_title(stage.title, fontsize=9)
    for axis in axes[0]:
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, file, dpi=100)
    plt.close(figure)
