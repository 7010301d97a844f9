"""Every n-th patch: keep visual tokens at equal steps in raster order.

Source:  ours; an example of a method in a package of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from htc_vlm.compressors import Compressor, ImageFeatures, budget_tokens, check_count


@dataclass(frozen=True)
class EveryNthSettings:
    n_keep: int = 64


class EveryNth(Compressor):
    name = "every_nth"
    Settings = EveryNthSettings
    EXAMPLES = ({"n_keep": 4}, {"n_keep": 3})
    PAPER = "control"
    ACTS = "before the LLM"
    TRAINED = False

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_keep", settings.n_keep)

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {"n_keep": budget_tokens(cls.name, budget, n_patches)}

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_keep", self.settings.n_keep, at_most=n_patches)
        return int(self.settings.n_keep)

    def places(self, n_patches: int) -> Tensor:
        """(n_keep,), ascending: the middle of each of n_keep equal stretches."""
        n_keep = self.n_visual(n_patches)
        return (2 * torch.arange(n_keep) + 1) * n_patches // (2 * n_keep)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        return images.project(images.features[:, self.places(images.features.shape[1])])

    def source(self, images: ImageFeatures) -> Tensor:
        n_images, n_patches, _ = images.features.shape
        return one_hot(self.places(n_patches), n_patches).float().expand(n_images, -1, -1)
