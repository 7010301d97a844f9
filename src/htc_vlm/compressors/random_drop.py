"""Random drop: keep a random subset of the patches. The floor that any selection method must beat.

Source:  the random-pruning control of the token-reduction literature (e.g. DivPrune, arXiv:2503.02175, Table 1).
Differs: the subset depends on the seed only, so a picture always keeps the same places; the global random state is
         left alone.

This file is the template for a new method: copy it, change the settings and `before_llm`, and the registry, the
contract tests and the README's table of methods find it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import one_hot

from htc_vlm.compressors.base import COMPRESSORS, Compressor, ImageFeatures, budget_tokens, check_count, check_seed
from htc_vlm.ops.select import keep_random


@dataclass(frozen=True)
class RandomDropSettings:
    n_keep: int = 64
    seed: int = 0


@COMPRESSORS.register("random_drop")
class RandomDrop(Compressor):
    name = "random_drop"
    Settings = RandomDropSettings
    EXAMPLES = ({"n_keep": 4}, {"n_keep": 2, "seed": 7})
    PAPER = "control"
    ACTS = "before the LLM"
    TRAINED = False

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {"n_keep": budget_tokens(cls.name, budget, n_patches)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_count(self.name, "n_keep", settings.n_keep)
        check_seed(self.name, "seed", settings.seed)

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_keep", self.settings.n_keep, at_most=n_patches)
        return int(self.settings.n_keep)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        return images.project(images.features[:, self.places(images)])

    def places(self, images: ImageFeatures) -> Tensor:
        """(n_keep,), ascending."""
        n_patches = images.features.shape[1]
        return keep_random(n_patches, self.n_visual(n_patches), self.settings.seed).to(images.features.device)

    def source(self, images: ImageFeatures) -> Tensor:
        """For pictures of where tokens come from; leave it out where that is not told."""
        n_images, n_patches, _ = images.features.shape
        return one_hot(self.places(images), n_patches).float().expand(n_images, -1, -1)
