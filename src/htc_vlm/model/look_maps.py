"""Byte maps of where the bottleneck looked, small enough to travel with a compressed image in the picture's place.

Source:  HTC-VLM section 5.3.1 and Figure 3 (attention of the bottleneck over anchors and patches).
Differs: one map an image (mean over layers, heads and bottleneck tokens), a byte a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, uint8


def split_visual(compressor: Mapping[str, Any], visual: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, ...) of the visual tokens -> anchors (N, A, ...) and those in a grid (N, C - A, ...).

    Anchors are those that stand as tokens of their own, A = 0 without; `channels: discrete` has a grid of codes.
    """
    if compressor.get("channels") != "hybrid" or compressor["fusion"] == "mean":
        return visual[:, :0], visual
    n_anchors = int(compressor["n_anchors"])
    if compressor["fusion"] == "post":
        return visual[:, -n_anchors:], visual[:, :-n_anchors]
    return visual[:, :n_anchors], visual[:, n_anchors:]


def byte_maps(compressor: Mapping[str, Any], attention: Tensor) -> Tensor:
    """(N, layers, H, K, C + K) attention of the bottleneck -> (N, P) uint8, each image's largest share at 255.

    ValueError for visual tokens that are no square grid: there would be nothing to lay over a picture.
    """
    n_bottleneck = attention.shape[3]
    visual = attention[..., :-n_bottleneck].float().mean(dim=(1, 2, 3))                     # (N, C)
    _, patches = split_visual(compressor, visual)
    if math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} visual tokens are no square grid; compress without maps")
    most = patches.amax(dim=1, keepdim=True).clamp_min(1e-12)
    return (255 * patches / most).round().to(uint8)
