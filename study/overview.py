"""Draws the README's first picture with the shipped models: a picture, its tokens, the few a method keeps, the cached one.

    python -m study.overview [--output docs/assets/overview.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

from htc_vlm import load
from htc_vlm.viz import token_map
from htc_vlm.viz.attention_map import look
from htc_vlm.viz.attention_map import overlay as warm

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "examples" / "pictures" / "scene.png"
N_KEEP = 9
QUESTION = "what is at the top left ?"


def grid(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a line between its side x side patches."""
    drawn = picture.convert("RGB").resize((480, 480), Image.Resampling.BICUBIC)
    lines = ImageDraw.Draw(drawn)
    for i in range(side + 1):
        at = round(i * 480 / side)
        lines.line((at, 0, at, 480), fill="white", width=2)
        lines.line((0, at, 480, at), fill="white", width=2)
    return drawn


def entry_bytes(model: Any) -> int:
    """Bytes of one token in the cache of every layer, in the model's own dtype."""
    text = model.config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--output", type=Path, default=ROOT / "docs" / "assets" / "overview.png")
    output = arguments.parse_args().output
    picture = Image.open(PICTURE).convert("RGB")
    upper, processor = load("tiny-upper")
    (kept,) = token_map.record(upper, processor, picture, QUESTION, "divprune", {"n_keep": N_KEEP})
    n_patches = kept.source.shape[1]
    one, one_processor = load("tiny")
    weights = look("", one, one_processor, [picture]).maps.patches[0].mean(dim=0)
    cached = one.compress(**one_processor(images=[picture], return_tensors="pt"))
    a_token = entry_bytes(upper)
    panels = [
        (picture, "a picture", "any vision-language model"),
        (grid(picture, round(n_patches**0.5)), f"{n_patches} tokens", f"{n_patches * a_token:,} bytes of cache"),
        (token_map.overlay(picture, kept.source), f"{N_KEEP} tokens (DivPrune)", f"{N_KEEP * a_token:,} bytes, no training"),
        (warm(picture, weights), "1 token (what it looked at)", f"{cached.nbytes:,} bytes, kept for ever"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (image, title, below) in zip(axes, panels, strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel(below, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for left in axes[:-1]:
        left.annotate("→", (1.06, 0.5), xycoords="axes fraction", fontsize=22, ha="center", va="center")
    figure.savefig(output, dpi=90)
    print(output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
