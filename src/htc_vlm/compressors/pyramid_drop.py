"""PyramidDrop: in stages, keep a shrinking share of the visual tokens, by the next layer's own queries and keys.

Source:  Xing et al., CVPR 2025, arXiv:2410.17247; released code at 6444f30; docs/specs/baselines.md section 6.
Differs: as in the code, the layer *after* the cut scores (the paper says the last one of the stage), and positions are
         renumbered after every stage. Left padding and any attention backend work (there: right padding with flash
         attention). The trained variant is left out. With several images each keeps its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from htc_vlm.compressors.base import COMPRESSORS, AppliedOnly, AttentionView, Keep, PruneStep, budget_tokens, check_count
from htc_vlm.ops import schedules
from htc_vlm.ops.select import keep_top


@dataclass(frozen=True)
class PyramidDropSettings:
    stages: tuple[int, ...] = (8, 16, 24)  # layers at whose input tokens leave; ops.schedules.PYRAMID_DROP has budgets
    ratio: float | tuple[float, ...] = 0.5  # shares of the patches, one per stage; or one number and its powers

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not isinstance(self.ratio, (int, float)):
            object.__setattr__(self, "ratio", tuple(self.ratio))


@COMPRESSORS.register("pyramid_drop")
class PyramidDrop(AppliedOnly):
    name = "pyramid_drop"
    Settings = PyramidDropSettings
    EXAMPLES = ({"stages": (1,), "ratio": 0.5}, {"stages": (1,), "ratio": (0.25,)})
    PAPER = "PyramidDrop, arXiv:2410.17247"
    ACTS = "inside the LLM"
    QUESTION_INDEPENDENT = False

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """Stages 2, 8, 16 of 32 layers, or as deep in other models, and the ratio that comes nearest."""
        n_tokens = budget_tokens(cls.name, budget, n_patches)
        published = (n_patches, n_layers) == (schedules.PUBLISHED_PATCHES, schedules.PUBLISHED_LAYERS)
        if published and n_tokens in schedules.PYRAMID_DROP:
            stages, ratio = schedules.PYRAMID_DROP[n_tokens]
            return {"stages": stages, "ratio": ratio}
        stages = tuple(max(1, round(stage * n_layers / schedules.PUBLISHED_LAYERS)) for stage in (2, 8, 16))
        if len(set(stages)) < len(stages):
            raise ValueError(
                f"{cls.name}: a budget has three stages, for which {n_layers} layers are too few; give stages and ratio instead"
            )
        return {"stages": stages, "ratio": schedules.pyramid_drop_ratio(n_patches, n_layers, stages, n_tokens)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        for stage in settings.stages:
            check_count(self.name, "stages", stage)
        schedules.pyramid_drop_keep(1, len(settings.stages), settings.ratio)  # refuses ratios that do not fit

    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        return schedules.pyramid_drop(n_patches, n_layers, self.settings.stages, self.settings.ratio)

    def drops(self, n_patches: int, n_layers: int) -> tuple[PruneStep, ...]:
        return tuple(PruneStep(stage, scores="next", renumber=True) for stage in self.settings.stages)

    def after_layer(self, layer: int, seen: AttentionView) -> Keep:
        kept = schedules.pyramid_drop_keep(seen.n_patches, len(self.settings.stages), self.settings.ratio)
        return Keep(keep_top(seen.scores, kept[self.settings.stages.index(layer + 1)]))
