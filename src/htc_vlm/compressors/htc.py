"""HTC-VLM: discrete anchors from a vector-quantized code beside the patches, all squeezed into the bottleneck.

Source:  HTC-VLM sections 4.1 and 4.2, Eq. 3 to 6, Algorithm 1 lines 1 to 7; Table 4 for the ablated settings.
Differs: Eq. 6 is read as a boolean mask (ops/masks.py). Eq. 4's GELU on the anchors' output is kept as printed.
         q is flattened in raster order, channels last (the paper does not say). "Mean" fusion is not defined there:
         ours averages the mean anchor into every patch. Discrete-only follows Table 4: one token per grid cell of the
         code (441 at 7B), through one shared two-layer GELU MLP, instead of anchors. `anchor_source` is ours, for
         ablations; `learnt` goes beyond the paper: its anchors need no tokenizer and learn with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from htc_vlm import quantizers
from htc_vlm.compressors.base import COMPRESSORS, ImageFeatures, Sizes, check_choice, check_count
from htc_vlm.compressors.voco import Bottleneck
from htc_vlm.quantizers.fsq import finite_scalar

FUSION = ("pre", "post", "mean")
CHANNELS = ("hybrid", "continuous", "discrete")
ANCHOR_SOURCE = ("quantized", "latents", "shuffled", "learnt")
LEARNT_LEVELS = (8, 8, 8, 5, 5, 5) * 4  # of each learnt anchor's code: 64,000 values, four times


@dataclass(frozen=True)
class HtcSettings:
    n_anchors: int = 4
    n_bottleneck: int = 1
    fusion: str = "pre"
    channels: str = "hybrid"
    visual_attention: str = "self"
    positions: str = "sequential"
    # quantizer: a registered one's `name` (mgvq), its `preset` or arguments, and the side of the picture that it reads.
    # ours: `latents` skips the quantization, `shuffled` gives each image another's code, `learnt` reads the patches
    anchor_source: str = "quantized"
    quantizer: dict[str, Any] = field(default_factory=lambda: {"preset": "f16c32g8", "image_size": 336})


@COMPRESSORS.register("htc")
class Htc(Bottleneck):
    name = "htc"
    Settings = HtcSettings
    _TINY: ClassVar[dict[str, Any]] = {
        "image_size": 32, "widths": [8, 8, 8], "depths": [1, 1, 1],
        "latent_channels": 8, "codebook_size": 16, "groups": 2,
    }  # fmt: skip
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"n_bottleneck": 3, "quantizer": _TINY},
        {"quantizer": _TINY},
        {"n_anchors": 1, "fusion": "post", "visual_attention": "causal", "quantizer": _TINY},
        {"fusion": "mean", "positions": "compact", "quantizer": _TINY},
        {"channels": "discrete", "quantizer": _TINY},
        {"channels": "continuous"},
        {"n_anchors": 2, "anchor_source": "learnt"},
    )
    PAPER = "HTC-VLM"

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_anchors", settings.n_anchors)
        check_choice(self.name, "fusion", settings.fusion, FUSION)
        check_choice(self.name, "channels", settings.channels, CHANNELS)
        check_choice(self.name, "anchor_source", settings.anchor_source, ANCHOR_SOURCE)
        if settings.anchor_source == "learnt" and settings.channels != "hybrid":
            raise ValueError(f"htc: learnt anchors stand beside the patches; channels is {settings.channels!r}, give hybrid")

    @property
    def has_code(self) -> bool:
        """Does it read the frozen quantizer's code?"""
        return self.settings.channels != "continuous" and self.settings.anchor_source != "learnt"

    def setup(self, sizes: Sizes) -> None:
        if self.settings.anchor_source == "learnt":
            self.learnt = LearntAnchors(self.settings.n_anchors, sizes.llm_width)
        if not self.has_code:
            return
        cls, options = self._quantizer()
        self.quantizer = cls(**options)
        self.quantizer.drop_decoder()  # encoding is all the anchors need
        self.quantizer.requires_grad_(False)
        channels, width = self.quantizer.channels, sizes.llm_width
        if self.settings.channels == "discrete":
            self.to_anchors = AnchorMLP(channels, width, width)
        else:
            hidden = self.settings.n_anchors * width  # Eq. 4: W1 16384 x 14112, W2 16384 x 16384
            self.to_anchors = AnchorMLP(self._code_side() ** 2 * channels, hidden, hidden)

    def _quantizer(self) -> tuple[type[quantizers.Quantizer], dict[str, Any]]:
        """The class and arguments that the setting `quantizer` names (beside the image size); ValueError for unknown ones."""
        try:
            return quantizers.resolve(**{key: value for key, value in self.settings.quantizer.items() if key != "image_size"})
        except ValueError as error:
            raise ValueError(f"htc: {error}") from error

    def _code_side(self) -> int:
        """Cells per side of the code: 21 for 336 pixels at 16 pixels a cell."""
        cls, options = self._quantizer()
        return int(self.settings.quantizer["image_size"]) // cls.pixels_per_cell(**options)

    def n_visual(self, n_patches: int) -> int:
        if self.settings.channels == "discrete":
            return self._code_side() ** 2
        if self.settings.channels == "continuous" or self.settings.fusion == "mean":
            return n_patches
        return n_patches + int(self.settings.n_anchors)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        if self.settings.channels == "continuous":
            return images.patches
        if self.settings.channels == "discrete":
            return self.to_anchors(self.code(images).flatten(1, 2))  # (B, h * w, D)
        patches = images.patches
        if self.settings.anchor_source == "learnt":
            anchors = self.learnt(patches)
        else:
            code = self.code(images)  # (B, h, w, channels)
            anchors = self.to_anchors(code.flatten(1)).unflatten(1, (self.settings.n_anchors, -1))  # (B, A, D)
        if self.settings.fusion == "mean":
            return (patches + anchors.mean(dim=1, keepdim=True)) / 2
        return torch.cat((anchors, patches) if self.settings.fusion == "pre" else (patches, anchors), dim=1)

    def code(self, images: ImageFeatures) -> Tensor:
        """(B, h, w, channels): q = Q(I) of Eq. 4, or what `anchor_source` puts in its place."""
        code = images.codes
        if code is None:
            if images.pixels is None:
                raise ValueError("htc needs the pixels of the image for its anchors; pass pixel_values (or codes)")
            code = self.encode(images.pixels)
        if self.settings.anchor_source == "shuffled":
            if code.shape[0] < 2:
                raise ValueError("anchor_source 'shuffled' needs at least two images in a batch to exchange codes")
            code = code.roll(1, dims=0)
        return code.to(images.features.dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) in [0, 1] -> (B, h, w, channels)."""
        out = self.quantizer.encode(quantizers.signed_pixels(pixels.float(), int(self.settings.quantizer["image_size"])))
        chosen = out.latents if self.settings.anchor_source == "latents" else out.quantized
        return chosen.permute(0, 2, 3, 1)


class AnchorMLP(nn.Module):
    """Eq. 4: GELU(W2 GELU(W1 q)), without biases."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(n_in, n_hidden, bias=False)
        self.w2 = nn.Linear(n_hidden, n_out, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)"""
        return nn.functional.gelu(self.w2(nn.functional.gelu(self.w1(q))))


class LearntAnchors(nn.Module):
    """Ours: each anchor pools the patches by its own query and is rounded to a discrete code; all of it learns with the model.

    The rounding (quantizers/fsq.py) needs neither a codebook nor a loss of its own.
    """

    def __init__(self, n_anchors: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, n_anchors, bias=False)
        self.to_code = nn.Linear(width, len(LEARNT_LEVELS))
        self.from_code = nn.Linear(len(LEARNT_LEVELS), width)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, P, D) -> (B, A, D)"""
        x = self.norm(patches)
        weights = self.queries(x).transpose(1, 2).softmax(dim=-1)  # (B, A, P)
        return self.from_code(finite_scalar(self.to_code(weights @ x), LEARNT_LEVELS))
