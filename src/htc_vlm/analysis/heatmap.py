"""What the bottleneck looked at: attention over anchors and patches, as numbers and over the picture.

Source:  HTC-VLM section 5.3.1 and Figure 3.
Differs: the maps come from the very pass that compresses (asking for them changes nothing), for every layer and all tokens,
         not the first 16; the overlay on the picture is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from htc_vlm.model.modeling import HtcVlmForConditionalGeneration
from htc_vlm.model.processing import HtcVlmProcessor


@dataclass(frozen=True)
class BottleneckMaps:
    """Attention of the first bottleneck token, mean over heads; of N images.

    anchors (N, layers, A): share of attention on each anchor (A = 0 for methods without). patches (N, layers, side, side).
    own (N, layers): share on the bottleneck itself. The three add up to 1.
    """

    anchors: Tensor
    patches: Tensor
    own: Tensor


def bottleneck_maps(model: HtcVlmForConditionalGeneration, pixel_values: Tensor) -> BottleneckMaps:
    """(N, 3, height, width) -> maps. ValueError for methods whose visual tokens are not anchors and a square of patches."""
    attention = model.bottleneck_attention(pixel_values=pixel_values)                       # (N, layers, H, K, C + K)
    first = attention[:, :, :, 0].mean(dim=2)                                               # (N, layers, C + K)
    n_bottleneck = model.model.compressor.n_bottleneck
    visual, own = first[..., :-n_bottleneck], first[..., -n_bottleneck:].sum(-1)
    anchors, patches = (part.movedim(1, -1) for part in split_visual(model, visual.movedim(-1, 1)))
    side = math.isqrt(patches.shape[-1])
    if side * side != patches.shape[-1]:
        raise ValueError(f"{patches.shape[-1]} visual tokens are no square grid; there is nothing to lay over a picture")
    return BottleneckMaps(anchors=anchors, patches=patches.unflatten(-1, (side, side)), own=own)


def split_visual(model: HtcVlmForConditionalGeneration, visual: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, ...) of the visual tokens -> anchors (N, A, ...) and those in a grid (N, C - A, ...).

    Anchors are those that stand as tokens of their own, A = 0 without; `channels: discrete` has a grid of codes.
    """
    settings = model.config.compressor
    if settings["name"] != "htc" or settings["channels"] != "hybrid" or settings["fusion"] == "mean":
        return visual[:, :0], visual
    n_anchors = int(settings["n_anchors"])
    if settings["fusion"] == "post":
        return visual[:, -n_anchors:], visual[:, :-n_anchors]
    return visual[:, :n_anchors], visual[:, n_anchors:]


def overlay(picture: Image.Image, weights: Tensor, side_pixels: int = 320) -> Image.Image:
    """A picture under a heat map: weights (side, side), scaled to their own maximum, over the padded square picture."""
    from matplotlib import colormaps

    square = Image.new("RGB", (max(picture.size),) * 2, (127, 127, 127))
    square.paste(picture.convert("RGB"), ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    square = square.resize((side_pixels, side_pixels), Image.Resampling.BILINEAR)
    scaled = (weights / weights.max().clamp_min(1e-9)).float().cpu().numpy()
    colours = (colormaps["inferno"](scaled)[..., :3] * 255).astype("uint8")
    heat = Image.fromarray(colours).resize(square.size, Image.Resampling.BICUBIC)
    return Image.blend(square, heat, 0.55)


@torch.no_grad()
def draw(
    model: HtcVlmForConditionalGeneration,
    processor: HtcVlmProcessor,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    file: str | Path,
) -> None:
    """One row per picture: the picture, the attention over it (mean over layers), and per layer how much goes to the anchors,
    the patches and the bottleneck itself."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    maps = bottleneck_maps(model, pixels)
    figure, rows = plt.subplots(len(pictures), 3, figsize=(9.6, 3.2 * len(pictures)), squeeze=False, layout="constrained")
    for i, (row, picture, name) in enumerate(zip(rows, pictures, names, strict=True)):
        row[0].imshow(picture)
        row[0].set_title(name, fontsize=9)
        row[1].imshow(overlay(picture, maps.patches[i].mean(dim=0)))
        row[1].set_title("attention over patches, mean of layers", fontsize=9)
        for axes in row[:2]:
            axes.axis("off")
        _shares(row[2], maps, i)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _shares(axes: object, maps: BottleneckMaps, i: int) -> None:
    """Stacked bars: where each layer's attention goes."""
    layers = range(maps.own.shape[1])
    anchors = maps.anchors[i].sum(dim=-1).float().cpu().numpy()
    patches = maps.patches[i].sum(dim=(-1, -2)).float().cpu().numpy()
    own = maps.own[i].float().cpu().numpy()
    axes.bar(layers, anchors, color="#d9822b", label=f"{maps.anchors.shape[-1]} anchors")  # type: ignore[attr-defined]
    axes.bar(layers, patches, bottom=anchors, color="#1f5fa8", label="patches")  # type: ignore[attr-defined]
    axes.bar(layers, own, bottom=anchors + patches, color="#b9bec6", label="bottleneck")  # type: ignore[attr-defined]
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1))  # type: ignore[attr-defined]
    axes.legend(fontsize=7, loc="lower right")  # type: ignore[attr-defined]
