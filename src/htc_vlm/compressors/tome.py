"""ToMe: merge the patches that are most alike, a few in every block of the vision tower, or after it.

Source:  Bolya et al., ICLR 2023, arXiv:2210.09461; official code at af95e4b; docs/specs/baselines.md section 4.
Differs: settings for LLaVA are ours (how SparseVLM ran its "ToMe 192/128/64" is unpublished): equal merges in every
         block before LLaVA's features, exact to the token. The keys that are compared are computed a second time, so
         the tower's attention stays as it is. `place: after_tower` merges the features instead, by halves;
         `restore_order` puts tokens in the order of their first patch (original: scrambled).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from htc_vlm.compressors.base import COMPRESSORS, AppliedOnly, ImageFeatures, budget_tokens, check_choice, check_count
from htc_vlm.ops.merge import TokenMerge, bipartite_soft_matching, halving_list, merge_list, patches_after

PLACES = ("tower", "after_tower")
METRICS = ("keys", "features")
DEFAULT_KEEP = 64


@dataclass(frozen=True)
class TomeSettings:
    """`merges` (how many in each block, or round) or `n_keep`; neither is n_keep 64."""

    n_keep: int | None = None
    merges: tuple[int, ...] | None = None
    place: str = "tower"
    metric: str = "keys"  # what is compared after the tower; `features` for towers without keys
    restore_order: bool = False

    def __post_init__(self) -> None:
        if self.merges is not None:
            object.__setattr__(self, "merges", tuple(self.merges))


@COMPRESSORS.register("tome")
class Tome(AppliedOnly):
    name = "tome"
    Settings = TomeSettings
    EXAMPLES = (
        {"n_keep": 4, "place": "after_tower", "metric": "features"},
        {"n_keep": 4, "place": "after_tower"},
        {"n_keep": 4},
    )
    PAPER = "ToMe, arXiv:2210.09461"
    VARIANTS = ({"place": "after_tower"},)
    ACTS = "inside the vision tower"

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {"n_keep": budget_tokens(cls.name, budget, n_patches)}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        check_choice(self.name, "place", settings.place, PLACES)
        check_choice(self.name, "metric", settings.metric, METRICS)
        if settings.n_keep is not None:
            check_count(self.name, "n_keep", settings.n_keep)
            if settings.merges is not None:
                raise ValueError(f"tome: n_keep={settings.n_keep} excludes merges={list(settings.merges)}; give one")
        for r in settings.merges or ():
            check_count(self.name, "merges", r, at_least=0)

    @property
    def n_keep(self) -> int:
        return DEFAULT_KEEP if self.settings.n_keep is None else int(self.settings.n_keep)

    @property
    def reads_tower(self) -> bool:
        return bool(self.settings.place == "after_tower" and self.settings.metric == "keys")

    def n_visual(self, n_patches: int) -> int:
        if self.settings.merges is not None:
            return patches_after(n_patches, self.settings.merges)
        check_count(self.name, "n_keep", self.n_keep, at_most=n_patches)
        return self.n_keep

    @property
    def merges_in_tower(self) -> bool:
        return bool(self.settings.place == "tower")

    def tower_merges(self, n_patches: int, n_blocks: int) -> list[int]:
        if self.settings.merges is None:
            return merge_list(n_patches, self.n_keep, n_blocks)
        if len(self.settings.merges) != n_blocks:
            raise ValueError(
                f"tome: merges has {len(self.settings.merges)} numbers; give one for each of the {n_blocks} blocks "
                "of the vision tower that come before LLaVA's features"
            )
        return list(self.settings.merges)

    def source(self, images: ImageFeatures) -> Tensor:
        _, merged = self.merged(images)
        return (merged.in_raster_order() if self.settings.restore_order else merged).source

    def merged(self, images: ImageFeatures) -> tuple[Tensor, TokenMerge]:
        """(B, C, width) and what went where, by the tower's blocks or after it."""
        if self.settings.place == "after_tower":
            return self.merge_features(images)
        if images.merged is None:
            raise ValueError("tome merges inside the vision tower; use htc_vlm.apply(model, 'tome', ...)")
        return images.features, images.merged

    def before_llm(self, images: ImageFeatures) -> Tensor:
        features, merged = self.merged(images)
        if self.settings.restore_order:
            features = in_raster_order(features, merged)
        return images.project(features)

    def merge_features(self, images: ImageFeatures) -> tuple[Tensor, TokenMerge]:
        """Rounds of matching on the features, each halving them at most -> (B, C, width) and what went where."""
        dtype = images.features.dtype
        features = metric = images.features.float()  # sizes above 256 have no place in bfloat16
        if self.reads_tower:
            if images.tower is None:
                raise ValueError("tome: the tower's keys are not known; use htc_vlm.apply, or metric='features'")
            metric = images.tower.keys.float()
        n_patches, size = features.shape[1], None
        self.n_visual(n_patches)
        merges = self.settings.merges
        merged = bipartite_soft_matching(metric, 0)
        for r in halving_list(n_patches, self.n_keep) if merges is None else merges:
            matching = bipartite_soft_matching(metric, r)
            metric, _ = matching.merge(metric, size)
            features, size = matching.merge(features, size)
            merged = merged.then(matching)
        return features.to(dtype), merged


def in_raster_order(features: Tensor, merged: TokenMerge) -> Tensor:
    """(B, C, width) merged tokens -> the same, ordered by the first patch that went into each.

    >>> features = torch.tensor([[[30.0], [10.0]]])             # patch 0 went into the second token
    >>> in_raster_order(features, TokenMerge(torch.tensor([[1, 0, 1]]), n_out=2)).flatten().tolist()
    [10.0, 30.0]
    """
    ordered = merged.in_raster_order().destination
    place = torch.zeros(features.shape[:2], dtype=torch.long, device=features.device)
    place = place.scatter(1, merged.destination, ordered)  # old token -> its new place
    return torch.zeros_like(features).scatter(1, place[..., None].expand_as(features), features)
