"""SparseVLM: words close to the image rate its tokens at three layers; what is dropped is recycled as cluster means.

Source:  Zhang et al., ICML 2025, arXiv:2410.04417; released code at 26a5f48, "v1.5" and SparseVLM+ (`plus`);
         docs/specs/baselines.md section 7.
Differs: the numbers of tokens come from the released tables, not from the paper's ranks of the attention. Raters are
         chosen among the tokens after the last image of each sample (the code: after its only image), by all images;
         if none is above the mean, all rate. Each image keeps its own table. A layer told to keep all that it has does
         nothing (there: one token leaves). The noise on the density has its own seed, or is off. Rows are recomputed, with
         a softmax in float32, so batches, padding and any backend work (there: batch 1, a full softmax per layer).
         `schedule` counts tokens entering a layer: the authors' "64" is 82 (ops.schedules.leaving counts as they do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from htc_vlm.compressors.base import (
    COMPRESSORS,
    AppliedOnly,
    AttentionView,
    Keep,
    Merge,
    PruneStep,
    budget_tokens,
    check_count,
    check_seed,
)
from htc_vlm.ops import schedules
from htc_vlm.ops.cluster import density_noise, dpc_knn_assign
from htc_vlm.ops.select import gather_tokens, keep_top
from htc_vlm.tokens import TokenLayout, equivalent_tokens

DEFAULT_BUDGET = 192


@dataclass(frozen=True)
class SparseVlmSettings:
    """`budget` (192, 128, 96 or 64, for 576 patches and 32 layers) or `layers` and `keep`; neither is budget 192."""

    budget: int | None = None
    layers: tuple[int, ...] | None = None  # tokens leave at the *output* of these
    keep: tuple[int, ...] | None = None  # how many stay there, without the recycled ones
    plus: bool = False  # SparseVLM+: positions kept, no recycling, distance corrected, the best heads only
    n_heads: int = 14  # plus: heads that rate; 14 of 32 in the released code
    noise_seed: int | None = 0  # None: no noise on the density

    def __post_init__(self) -> None:
        for name in ("layers", "keep"):
            value = (self.layers, self.keep)[name == "keep"]
            if value is not None:
                object.__setattr__(self, name, tuple(value))


@COMPRESSORS.register("sparse_vlm")
class SparseVlm(AppliedOnly):
    name = "sparse_vlm"
    Settings = SparseVlmSettings
    EXAMPLES = ({"layers": (0,), "keep": (3,)}, {"layers": (0,), "keep": (2,), "plus": True, "n_heads": 1})
    PAPER = "SparseVLM, arXiv:2410.04417"
    ACTS = "inside the LLM"
    QUESTION_INDEPENDENT = False
    VARIANTS = ({"plus": True},)

    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        """A released table; in other models than 576 patches and 32 layers, the table of the same share, scaled."""
        n_tokens = budget_tokens(cls.name, budget, n_patches)
        if (n_patches, n_layers) == (schedules.PUBLISHED_PATCHES, schedules.PUBLISHED_LAYERS):
            try:
                schedules.sparse_vlm_budget(n_tokens, n_patches, n_layers)
            except ValueError as error:
                raise ValueError(f"{cls.name}: {error}") from error
            return {"budget": n_tokens}
        tables = {round(share * n_patches / schedules.PUBLISHED_PATCHES): share for share in schedules.SPARSE_VLM}
        if n_tokens not in tables:
            known = ", ".join(map(str, sorted(tables, reverse=True)))
            raise ValueError(
                f"sparse_vlm has released tables for {known} of {n_patches} tokens, not for {n_tokens}; or give layers and keep"
            )
        scaled = schedules.sparse_vlm_scaled(tables[n_tokens], n_patches, n_layers)
        return {"layers": scaled.layers, "keep": scaled.keep}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if (settings.layers is None) != (settings.keep is None):
            raise ValueError("sparse_vlm: layers and keep go together, one number per layer; give both, or budget")
        if settings.budget is not None and settings.layers is not None:
            raise ValueError(f"sparse_vlm: budget={settings.budget} excludes explicit layers and keep; give one of them")
        for layer in settings.layers or ():
            check_count(self.name, "layers", layer, at_least=0)
        check_count(self.name, "n_heads", settings.n_heads)
        if settings.noise_seed is not None:
            check_seed(self.name, "noise_seed", settings.noise_seed)

    def authors_tokens(self, schedule: Sequence[int]) -> float:
        """Tokens leaving each layer."""
        return equivalent_tokens(schedules.leaving(schedule))

    def plan(self, n_patches: int, n_layers: int) -> schedules.SparseVlmSettings:
        """Layers and tokens to keep for a model; ValueError where the published tables do not apply."""
        if self.settings.layers is not None:
            return schedules.SparseVlmSettings(self.settings.layers, self.settings.keep, not self.settings.plus)
        budget = DEFAULT_BUDGET if self.settings.budget is None else self.settings.budget
        return schedules.sparse_vlm_budget(budget, n_patches, n_layers, self.settings.plus)

    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        return schedules.sparse_vlm(n_patches, n_layers, self.plan(n_patches, n_layers))

    def drops(self, n_patches: int, n_layers: int) -> tuple[PruneStep, ...]:
        layers = self.plan(n_patches, n_layers).layers
        return tuple(PruneStep(layer + 1, renumber=not self.settings.plus) for layer in layers)

    @property
    def needs_distance(self) -> bool:
        return bool(self.settings.plus)

    def check_heads(self, n_heads: int) -> None:
        if self.settings.plus and self.settings.n_heads > n_heads:
            raise ValueError(f"sparse_vlm: n_heads is {self.settings.n_heads}; the model has {n_heads}")

    def queries(self, embeds: Tensor, layout: TokenLayout) -> Tensor:
        return raters(embeds, layout)

    def after_layer(self, layer: int, seen: AttentionView) -> Keep | Merge | None:
        plan = self._tables(seen.n_patches)
        n_keep = plan.keep[plan.layers.index(layer)]
        if n_keep == seen.states.shape[1]:
            return None  # nothing leaves, so nothing is recycled
        if self.settings.plus:
            return Keep(keep_top(corrected_scores(seen, self.settings.n_heads), n_keep))
        return Merge(recycle(seen.scores, seen.states, n_keep, self.settings.noise_seed))

    def _tables(self, n_patches: int) -> schedules.SparseVlmSettings:
        """As `plan`, of a model that `plan` has accepted."""
        return self.plan(n_patches, schedules.PUBLISHED_LAYERS)


def raters(embeds: Tensor, layout: TokenLayout) -> Tensor:
    """(B, L, D) input embeddings -> (B, L) bool: the text tokens most like the image, above their mean.

    Each visual token shares itself out among the text by a softmax of dot products; a rater gets more than the mean.

    >>> embeds = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    >>> raters(embeds, TokenLayout.from_string("vvttt")).int().tolist()
    [[0, 0, 1, 0, 0]]
    """
    column = torch.arange(layout.kind.shape[1], device=embeds.device)
    last_visual = torch.where(layout.is_visual, column, -1).amax(dim=1, keepdim=True)
    is_text = layout.is_text & (column > last_visual) & (last_visual >= 0)  # (B, L)
    has_image = layout.is_visual.any(dim=1)
    if bool((has_image & ~is_text.any(dim=1)).any()):
        raise ValueError("sparse_vlm needs text after the last image of each prompt: its tokens rate the image")
    points = embeds.float()
    logits = (points @ points.transpose(1, 2)).masked_fill(~is_text[:, None], torch.finfo(torch.float32).min)
    n_visual = layout.is_visual.sum(dim=1, keepdim=True).clamp(min=1)
    share = (logits.softmax(dim=-1) * layout.is_visual[..., None]).sum(dim=1) / n_visual  # (B, L)
    mean = (share * is_text).sum(dim=1, keepdim=True) / is_text.sum(dim=1, keepdim=True).clamp(min=1)
    above = is_text & (share > mean)
    return torch.where(above.any(dim=1, keepdim=True), above, is_text)


def recycle(scores: Tensor, states: Tensor, n_keep: int, noise_seed: int | None) -> Tensor:
    """scores (I, n), states (I, n, D) -> (I, n_keep + n_recycled, n) weights: the best as they are, then means.

    The best third of those dropped is clustered (DPC-KNN); the rest is lost.

    >>> scores = torch.tensor([[0.5, 0.1, 0.4, 0.3, 0.2]])      # of three dropped one is recycled: token 3
    >>> recycle(scores, torch.zeros(1, 5, 2), n_keep=2, noise_seed=None)[0].tolist()
    [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]]
    """
    n_images, n = scores.shape
    n_means, n_candidates = schedules.n_recycled(n - n_keep), schedules.n_recyclable(n - n_keep)
    kept = keep_top(scores, n_keep)
    rest = scores.scatter(1, kept, -torch.inf)
    candidates = rest.argsort(dim=1, descending=True, stable=True)[:, :n_candidates]  # best first
    noise = None if noise_seed is None else density_noise(n_images, n_candidates, noise_seed)
    cluster = dpc_knn_assign(gather_tokens(states, candidates), n_means, noise)
    member = one_hot(cluster, n_means).transpose(1, 2).float()  # (I, n_means, n_candidates)
    weights = torch.zeros(n_images, n_keep + n_means, n, device=scores.device)
    weights[:, :n_keep].scatter_(2, kept[..., None], 1.0)
    means = member / member.sum(dim=-1, keepdim=True)
    weights[:, n_keep:].scatter_(2, candidates[:, None].expand(-1, n_means, -1), means)
    return weights


def corrected_scores(seen: AttentionView, n_heads: int) -> Tensor:
    """SparseVLM+: (I, n_now) scores without the rotary embedding's preference for what is near, of the best heads.

    Attention is divided by what rotation leaves of the product of two vectors of ones at that distance; then the
    `n_heads` heads that give the image most are averaged. Far away that product comes near 0 and below it, here as in
    the released code.
    """
    if n_heads > seen.attention.shape[1]:
        raise ValueError(f"sparse_vlm: n_heads is {n_heads}; the model has {seen.attention.shape[1]}")
    width = 2 * seen.inv_freq.shape[0]
    angle = seen.distance[..., None] * seen.inv_freq.float()  # (I, R, n_now, head_dim / 2)
    decay = 2 * angle.cos().sum(dim=-1) / width**0.5  # ones rotated by p and q: sum of 2 cos
    rows = seen.attention / decay[:, None] * seen.is_row[:, None, :, None]
    per_head = rows.sum(dim=2) / seen.is_row.sum(dim=1)[:, None, None]  # (I, H, n_now)
    best = keep_top(per_head.sum(dim=-1), n_heads)  # (I, n_heads)
    return gather_tokens(per_head, best).mean(dim=1)
