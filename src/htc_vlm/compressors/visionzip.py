"""VisionZip: the patches that the class token attends to most, and averages of the others by what they resemble.

Source:  Yang et al., CVPR 2025, arXiv:2412.04467; released code at 3151f6d; docs/specs/baselines.md section 9.
Differs: nothing in the result (`n_dominant` counts the class token, which is the first; contextual tokens are target
         plus mean, as in the code). The class token's row is recomputed from the block's queries and keys, so the
         vision tower keeps its attention backend (there: eager only, patched globally). Ties go to the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from htc_vlm.compressors.base import COMPRESSORS, AppliedOnly, ImageFeatures, TowerView, budget_tokens, check_count
from htc_vlm.ops.merge import ContextualMerge, contextual_merge
from htc_vlm.ops.select import gather_tokens, keep_top


@dataclass(frozen=True)
class VisionZipSettings:
    n_dominant: int = 54  # the class token and 53 patches; 108 + 20 and 162 + 30 for 128 and 192
    n_contextual: int = 10


@COMPRESSORS.register("visionzip")
class VisionZip(AppliedOnly):
    name = "visionzip"
    Settings = VisionZipSettings
    EXAMPLES = ({"n_dominant": 3, "n_contextual": 2}, {"n_dominant": 2, "n_contextual": 1})
    PAPER = "VisionZip, arXiv:2412.04467"
    ACTS = "before the LLM"

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """Shares as in the released 162 + 30, 108 + 20 and 54 + 10."""
        n_tokens = budget_tokens(cls.name, budget, n_patches)
        if n_tokens < 2:
            raise ValueError("visionzip: 2 tokens are the fewest, the class token and the patch that it looks at most")
        n_dominant = max(2, round(n_tokens * 27 / 32))
        return {"n_dominant": n_dominant, "n_contextual": max(0, n_tokens - n_dominant)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_dominant", settings.n_dominant, at_least=2)
        check_count(self.name, "n_contextual", settings.n_contextual, at_least=0)

    @property
    def reads_tower(self) -> bool:
        return True

    def n_visual(self, n_patches: int) -> int:
        n_dominant, n_contextual = self.settings.n_dominant, self.settings.n_contextual
        if n_dominant - 1 + n_contextual > n_patches:
            raise ValueError(
                f"visionzip: n_dominant={n_dominant} (one is the class token) and n_contextual={n_contextual} "
                f"need {n_dominant - 1 + n_contextual} patches; there are {n_patches}"
            )
        return int(n_dominant + n_contextual)

    def choose(self, images: ImageFeatures) -> tuple[Tensor, Tensor, ContextualMerge, TowerView]:
        """(B, n_dominant - 1) and (B, the other patches) places, what becomes of the others, and the tower's view."""
        if images.tower is None:
            raise ValueError("visionzip needs the tower's class token and keys; use htc_vlm.apply")
        features, view = images.features, images.tower
        n_images, n_patches, _ = features.shape
        self.n_visual(n_patches)
        dominant = keep_top(view.class_attention, self.settings.n_dominant - 1)
        is_left = torch.ones(n_images, n_patches, dtype=torch.bool, device=features.device).scatter(1, dominant, False)
        left = is_left.nonzero()[:, 1].view(n_images, -1)
        contextual = contextual_merge(gather_tokens(features, left), gather_tokens(view.keys, left), self.settings.n_contextual)
        return dominant, left, contextual, view

    def source(self, images: ImageFeatures) -> Tensor:
        """The class token comes first, from no patch."""
        dominant, left, contextual, _ = self.choose(images)
        n_images, n_patches, _ = images.features.shape
        one_each = one_hot(dominant, n_patches).float()
        merged = contextual.source.new_zeros(n_images, contextual.source.shape[1], n_patches)
        merged = merged.scatter(2, left[:, None].expand_as(contextual.source), contextual.source)
        return torch.cat((torch.zeros_like(one_each[:, :1]), one_each, merged), dim=1)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        features = images.features
        dominant, _, contextual, view = self.choose(images)
        tokens = (view.class_feature.to(features.dtype), gather_tokens(features, dominant), contextual.tokens)
        return images.project(torch.cat(tokens, dim=1))
