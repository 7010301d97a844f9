"""FastV: after a few layers, keep the visual tokens that the prompt's last token attends to most.

Source:  Chen et al., ECCV 2024, arXiv:2403.06764; released code at d165972 (its KV-cache fork);
         docs/specs/baselines.md section 5.
Differs: the number of tokens is the setting, not a share of the patches. The last token's attention decides, as in the
         code (the paper says the mean over all tokens). The choice is made once, at prefill (the fork without a cache
         chooses again for every new token). With several images each keeps `n_keep`. Only the row that decides is
         recomputed, so any attention backend will do (there: eager only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from htc_vlm.compressors.base import COMPRESSORS, AppliedOnly, AttentionView, Keep, PruneStep, budget_tokens, check_count
from htc_vlm.ops import schedules
from htc_vlm.ops.select import keep_top


@dataclass(frozen=True)
class FastVSettings:
    n_keep: int = 288  # the paper's R = 50 %; 166, 98, 30 for a mean of 192, 128, 64 tokens
    layer: int = 2  # K: the first layer that sees n_keep tokens


@COMPRESSORS.register("fastv")
class FastV(AppliedOnly):
    name = "fastv"
    Settings = FastVSettings
    EXAMPLES = ({"n_keep": 4, "layer": 1}, {"n_keep": 2, "layer": 1})
    PAPER = "FastV, arXiv:2403.06764"
    ACTS = "inside the LLM"
    QUESTION_INDEPENDENT = False

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """The paper's layer 2 of 32, or as deep in other models.

        >>> FastV.for_budget(64, n_patches=576, n_layers=32)
        {'n_keep': 30, 'layer': 2}
        """
        layer = max(1, round(2 * n_layers / schedules.PUBLISHED_LAYERS))
        n_tokens = budget_tokens(cls.name, budget, n_patches)
        return {"n_keep": schedules.fastv_keep(n_patches, n_layers, n_tokens, layer), "layer": layer}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_keep", settings.n_keep)
        check_count(self.name, "layer", settings.layer)

    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        check_count(self.name, "n_keep", self.settings.n_keep, at_most=n_patches)
        return schedules.fastv(n_patches, n_layers, self.settings.n_keep, self.settings.layer)

    def drops(self, n_patches: int, n_layers: int) -> tuple[PruneStep, ...]:
        return (PruneStep(self.settings.layer),)

    def after_layer(self, layer: int, seen: AttentionView) -> Keep:
        return Keep(keep_top(seen.scores, self.settings.n_keep))
