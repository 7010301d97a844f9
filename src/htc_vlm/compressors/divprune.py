"""DivPrune: keep the patches that differ most from each other, by greedy max-min selection on cosine distance.

Source:  Alvar et al., CVPR 2025, arXiv:2503.02175; released code (`DivPrune`), on projected features, as there.
Differs: the number of tokens is the setting, not a share of the patches; a patch is never picked twice (the released
         code can, when patches are identical); ties go to the lowest index; kept tokens stay in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

from htc_vlm.compressors.base import COMPRESSORS, Compressor, ImageFeatures, budget_tokens, check_count
from htc_vlm.ops.select import gather_tokens, keep_diverse


@dataclass(frozen=True)
class DivPruneSettings:
    n_keep: int = 64


@COMPRESSORS.register("divprune")
class DivPrune(Compressor):
    name = "divprune"
    Settings = DivPruneSettings
    EXAMPLES = ({"n_keep": 4}, {"n_keep": 1})
    PAPER = "DivPrune, arXiv:2503.02175"
    ACTS = "before the LLM"
    TRAINED = False

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {"n_keep": budget_tokens(cls.name, budget, n_patches)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_keep", settings.n_keep)

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_keep", self.settings.n_keep, at_most=n_patches)
        return int(self.settings.n_keep)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        patches = images.patches  # (B, P, D)
        return gather_tokens(patches, self.places(patches))

    def places(self, patches: Tensor) -> Tensor:
        """(B, P, D) -> (B, n_keep), ascending."""
        return keep_diverse(patches, self.n_visual(patches.shape[1]))

    def source(self, images: ImageFeatures) -> Tensor:
        patches = images.patches
        return one_hot(self.places(patches), patches.shape[1]).float()
