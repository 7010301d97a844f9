"""VoCo-LLaMA: the language model squeezes all patches into the keys and values of learned bottleneck tokens.

Source:  Ye et al. 2025, arXiv:2406.12275; released code at 3b6e14d (its mask and its positions).
Differs: images attend only to themselves (the released code lets BOS reach the patches and hides it from the text);
         the patches really leave the cache after compression (the released code keeps and re-masks them);
         K is a setting (there: the constant 2 in two files); all K tokens share one embedding, as there. The prompt keeps
         its order (there: the system prompt moves behind the bottleneck, and line breaks are stripped).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from htc_vlm.compressors.base import COMPRESSORS, Compressor, budget_tokens, check_choice, check_count
from htc_vlm.ops import masks, rope
from htc_vlm.tokens import TokenLayout


@dataclass(frozen=True)
class VocoSettings:
    n_bottleneck: int = 1
    visual_attention: str = "causal"
    positions: str = "sequential"


class Bottleneck(Compressor):
    """What all bottleneck methods share: K tokens per image, a mask, and a numbering."""

    ACTS = "bottleneck"

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """As many tokens in the cache; while it is compressed, the language model reads all patches."""
        return {"n_bottleneck": budget_tokens(cls.name, budget, n_patches)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_bottleneck", settings.n_bottleneck)
        check_choice(self.name, "visual_attention", settings.visual_attention, masks.VISUAL_ATTENTION)
        check_choice(self.name, "positions", settings.positions, rope.POSITIONS)

    @property
    def n_bottleneck(self) -> int:
        return int(self.settings.n_bottleneck)

    @property
    def positions(self) -> str:
        return str(self.settings.positions)

    def visible(self, layout: TokenLayout) -> Tensor:
        return masks.visible(layout, self.settings.visual_attention)


@COMPRESSORS.register("voco")
class Voco(Bottleneck):
    name = "voco"
    Settings = VocoSettings
    EXAMPLES = ({"n_bottleneck": 3}, {}, {"positions": "compact"}, {"visual_attention": "self"})
    PAPER = "VoCo-LLaMA, arXiv:2406.12275"
