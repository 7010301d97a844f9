"""Downsampling: the picture is shrunk until the vision tower makes as few patches as a method keeps. A control.

Source:  VTC-Bench, arXiv:2510.07143 (the picture at a lower resolution as the baseline that methods must beat).
Differs: towers of one resolution read the small picture with interpolated position embeddings, as transformers has them;
         models that read pictures at their own size need no method: shrink the picture before the processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from htc_vlm.compressors.base import COMPRESSORS, AppliedOnly, budget_tokens, check_count


@dataclass(frozen=True)
class DownsampleSettings:
    n_tokens: int = 64  # a square number: 1, 4, 9, ...


@COMPRESSORS.register("downsample")
class Downsample(AppliedOnly):
    name = "downsample"
    Settings = DownsampleSettings
    EXAMPLES = ({"n_tokens": 4}, {"n_tokens": 1})
    PAPER = "control (VTC-Bench, arXiv:2510.07143)"
    ACTS = "before the vision tower"

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """The nearest square."""
        return {"n_tokens": max(1, round(math.sqrt(budget_tokens(cls.name, budget, n_patches)))) ** 2}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_tokens", settings.n_tokens)
        if math.isqrt(settings.n_tokens) ** 2 != settings.n_tokens:
            raise ValueError(f"downsample: n_tokens is {settings.n_tokens}; give a square number (1, 4, 9, ...)")

    @property
    def picture_side(self) -> int | None:
        return math.isqrt(self.settings.n_tokens)

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_tokens", self.settings.n_tokens, at_most=n_patches)
        return int(self.settings.n_tokens)
