"""What the bottleneck looked at: attention over anchors and patches, as numbers and over the picture.

Source:  HTC-VLM section 5.3.1 and Figure 3.
Differs: the maps come from the very pass that compresses (asking for them changes nothing), for every layer and all tokens,
         not the first 16; the overlay on the picture is ours. The paper does not say which layer it shows, nor whether heads
         are averaged: here every layer and their mean, heads averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from htc_vlm.files import save_figure
from htc_vlm.model.look_maps import split_visual
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration, check_llava
from htc_vlm.model.processing import HtcVlmProcessor
from htc_vlm.viz.seen import seen_by_model


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
    check_llava(model, "a map of what the bottleneck looked at")
    attention = model.bottleneck_attention(pixel_values=pixel_values)                       # (N, layers, H, K, C + K)
    first = attention[:, :, :, 0].mean(dim=2)                                               # (N, layers, C + K)
    n_bottleneck = model.model.compressor.n_bottleneck
    visual, own = first[..., :-n_bottleneck], first[..., -n_bottleneck:].sum(-1)
    anchors, patches = (part.movedim(1, -1) for part in split_visual(model.config.compressor, visual.movedim(-1, 1)))
    side = math.isqrt(patches.shape[-1])
    if side * side != patches.shape[-1]:
        raise ValueError(f"{patches.shape[-1]} visual tokens are no square grid; there is nothing to lay over a picture")
    return BottleneckMaps(anchors=anchors, patches=patches.unflatten(-1, (side, side)), own=own)


def overlay(square: Image.Image, weights: Tensor, side_pixels: int = 320) -> Image.Image:
    """What the model saw (`seen_by_model`) under a heat map: weights (side, side), scaled to their own maximum."""
    from matplotlib import colormaps

    square = square.convert("RGB").resize((side_pixels, side_pixels), Image.Resampling.BILINEAR)
    scaled = (weights / weights.max().clamp_min(1e-9)).float().cpu().numpy()
    colours = (colormaps["inferno"](scaled)[..., :3] * 255).astype("uint8")
    heat = Image.fromarray(colours).resize(square.size, Image.Resampling.BICUBIC)
    return Image.blend(square, heat, 0.55)


@dataclass(frozen=True)
class Look:
    """What one model looked at in some pictures; seen: the square of each that it saw."""

    label: str
    maps: BottleneckMaps
    seen: Sequence[Image.Image] = ()


@torch.no_grad()
def look(
    label: str, model: HtcVlmForConditionalGeneration, processor: HtcVlmProcessor, pictures: Sequence[Image.Image]
) -> Look:
    """The maps of a model over pictures."""
    check_llava(model, "a map of what the bottleneck looked at")
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    return Look(label, bottleneck_maps(model, pixels), [seen_by_model(model, processor, picture) for picture in pictures])


def shares(maps: BottleneckMaps) -> dict[str, list[float]]:
    """Where each layer's attention goes, mean over pictures: {"anchors", "patches", "bottleneck": one share per layer}.

    >>> two_anchors, four_patches = torch.full((1, 1, 2), 0.1), torch.full((1, 1, 2, 2), 0.1)
    >>> maps = BottleneckMaps(anchors=two_anchors, patches=four_patches, own=torch.full((1, 1), 0.4))
    >>> {name: [round(share, 2) for share in row] for name, row in shares(maps).items()}
    {'anchors': [0.2], 'patches': [0.4], 'bottleneck': [0.4]}
    """
    parts = {"anchors": maps.anchors.sum(-1), "patches": maps.patches.sum((-1, -2)), "bottleneck": maps.own}
    return {name: part.float().mean(dim=0).tolist() for name, part in parts.items()}


def draw(
    model: HtcVlmForConditionalGeneration,
    processor: HtcVlmProcessor,
    pictures: Sequence[Image.Image],
    names: Sequence[str],
    file: str | Path,
) -> None:
    """`draw_pictures` of one model."""
    draw_pictures([look("", model, processor, pictures)], pictures, names, file)


def draw_pictures(looks: Sequence[Look], pictures: Sequence[Image.Image], names: Sequence[str], file: str | Path) -> None:
    """One row per picture: the picture, and for each model the attention over what it saw of it (mean over layers) and, per
    layer, how much goes to the anchors, the patches and the bottleneck itself."""
    plt = _pyplot()
    n_columns = 1 + 2 * len(looks)
    size = (3.2 * n_columns, 3.2 * len(pictures))
    figure, rows = plt.subplots(len(pictures), n_columns, figsize=size, squeeze=False, layout="constrained")
    for i, (row, picture, name) in enumerate(zip(rows, pictures, names, strict=True)):
        row[0].imshow(picture)
        row[0].set_title(name, fontsize=9)
        row[0].axis("off")
        for one, over, bars in zip(looks, row[1::2], row[2::2], strict=True):
            over.imshow(overlay(one.seen[i], one.maps.patches[i].mean(dim=0)))
            what = "attention over patches, mean of layers"
            over.set_title(f"{one.label}\n{what}" if one.label else what, fontsize=9)
            over.axis("off")
            _bars(bars, one.maps, i)
    save_figure(figure, file, dpi=110)
    plt.close(figure)


def draw_rows(looks: Sequence[Look], names: Sequence[str], file: str | Path) -> None:
    """Figure 3: one panel per model and layer, and their mean on top; a row per picture, a column per anchor and patch.

    The models of one layer share a colour scale. Each title says what share of the attention the anchors get, and what
    they would get if it were spread evenly.
    """
    plt = _pyplot()
    matrices = [_by_token(one.maps) for one in looks]                                       # each (N, layers, A + P)
    n_layers = {matrix.shape[1] for matrix in matrices}
    if len(n_layers) > 1:
        raise ValueError(f"models of {sorted(n_layers)} layers cannot be drawn beside each other layer by layer")
    labels = ["mean of layers", *(f"layer {layer}" for layer in range(n_layers.pop()))]
    size = (6.4 * len(looks), (0.9 + 0.13 * len(names)) * len(labels))
    figure, grid = plt.subplots(len(labels), len(looks), figsize=size, squeeze=False, layout="constrained")
    for row, (panels, label) in enumerate(zip(grid, labels, strict=True)):
        shown = [matrix.mean(dim=1) if row == 0 else matrix[:, row - 1] for matrix in matrices]
        top = max(float(values.max()) for values in shown)
        for axes, one, values in zip(panels, looks, shown, strict=True):
            image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
            n_anchors = one.maps.anchors.shape[-1]
            axes.set_title(_row_title(one, label, values), fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=5)
            axes.tick_params(axis="x", labelsize=6)
            if n_anchors:
                axes.axvline(n_anchors - 0.5, color="white", linewidth=1)
        figure.colorbar(image, ax=panels[-1], pad=0.01).ax.tick_params(labelsize=6)
    for axes in grid[-1]:
        axes.set_xlabel("anchors, then patches in reading order", fontsize=8)
    save_figure(figure, file, dpi=130)
    plt.close(figure)


def _by_token(maps: BottleneckMaps) -> Tensor:
    """(N, layers, A + P) on the CPU."""
    return torch.cat((maps.anchors, maps.patches.flatten(-2)), dim=-1).float().cpu()


def _row_title(one: Look, label: str, values: Tensor) -> str:
    n_anchors, n_tokens = one.maps.anchors.shape[-1], values.shape[-1]
    name = f"{one.label}, {label}" if one.label else label
    if not n_anchors:
        return name
    share = float(values[:, :n_anchors].sum(-1).mean())
    return f"{name}: {100 * share:.0f} % on anchors (even: {100 * n_anchors / (n_tokens + 1):.0f} %)"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _bars(axes: Any, maps: BottleneckMaps, i: int) -> None:
    """Stacked bars: where each layer's attention goes."""
    part = shares(BottleneckMaps(maps.anchors[i : i + 1], maps.patches[i : i + 1], maps.own[i : i + 1]))
    layers = range(maps.own.shape[1])
    below = [0.0] * len(layers)
    labels = {"anchors": f"{maps.anchors.shape[-1]} anchors", "patches": "patches", "bottleneck": "bottleneck"}
    for (name, heights), colour in zip(part.items(), ("#d9822b", "#1f5fa8", "#b9bec6"), strict=True):
        if name == "anchors" and not maps.anchors.shape[-1]:
            continue
        axes.bar(layers, heights, bottom=below, color=colour, label=labels[name])
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1))
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)  # not over the bars
