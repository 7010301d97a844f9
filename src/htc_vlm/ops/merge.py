"""Merging tokens: ToMe's bipartite soft matching and its schedules, and VisionZip's contextual merge.

Source:  Token Merging (Bolya et al., ICLR 2023), section 3 and official code af95e4b; VisionZip (CVPR 2025),
         official code 3151f6d, for `contextual_merge`; docs/specs/baselines.md sections 4 and 9.
Differs: sorting is stable, so that ties are the same on every device (official: unstable argsort); similarities are
         computed in float32 whatever the dtype; a merge that does not fit is refused (official: made smaller).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


@dataclass(frozen=True)
class TokenMerge:
    """Which of `n_out` tokens each of N tokens goes into: `destination` (B, N). Every output has a source."""

    destination: Tensor
    n_out: int

    @property
    def source(self) -> Tensor:
        """(B, N', N) of 0 and 1: row i marks the tokens that went into token i (the official `merge_source`)."""
        return one_hot(self.destination, self.n_out).transpose(1, 2).to(torch.float32)

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), size (B, N, 1) -> x (B, N', D), size (B, N', 1): means weighted by size, and the summed sizes.

        `size` is how many patches a token stands for; None means one each.
        """
        if size is None:
            size = torch.ones_like(x[..., :1])
        summed_size = self.sum(size)
        return self.sum(x * size) / summed_size, summed_size

    def sum(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N', D), the sum of what goes into each token."""
        out = x.new_zeros(x.shape[0], self.n_out, x.shape[-1])
        return out.scatter_add(1, self.destination[..., None].expand_as(x), x)

    def then(self, later: TokenMerge) -> TokenMerge:
        """This merge followed by `later`, as one: the sources after several blocks."""
        if later.destination.shape[1] != self.n_out:
            taken = later.destination.shape[1]
            raise ValueError(f"the first merge leaves {self.n_out} tokens, the second takes {taken}")
        return TokenMerge(later.destination.gather(1, self.destination), later.n_out)

    def in_raster_order(self) -> TokenMerge:
        """The same groups, ordered by the smallest source index; the original leaves them scrambled.

        >>> TokenMerge(torch.tensor([[1, 0, 1]]), n_out=2).in_raster_order().destination
        tensor([[0, 1, 0]])
        """
        n = self.destination.shape[1]
        index = torch.arange(n, device=self.destination.device).expand_as(self.destination)
        first = torch.full_like(self.destination[:, :1], n).expand(-1, self.n_out)
        first = first.scatter_reduce(1, self.destination, index, reduce="amin")  # (B, N')
        rank = first.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return TokenMerge(rank.gather(1, self.destination), self.n_out)


def bipartite_soft_matching(metric: Tensor, r: int, class_token: bool = False) -> TokenMerge:
    """Merge the r tokens at even positions that are most like a token at an odd position into that token.

    metric (B, N, M): keys of the block, averaged over heads. Result: N - r tokens, the even ones that were kept (most
    alike first; in their order when there is a class token, which is never merged) and then all odd ones.
    Raises ValueError when r is more than half of the tokens, not counting the class token: more cannot be matched.

    >>> metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> matching = bipartite_soft_matching(metric, r=1)         # token 0 is like token 1; kept: 2; odd: 1 and 3
    >>> matching.source[0].int().tolist()
    [[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    >>> size = torch.tensor([[[1.0], [3.0], [1.0], [1.0]]])
    >>> x, size = matching.merge(torch.tensor([[[2.0], [4.0], [6.0], [8.0]]]), size)
    >>> x.flatten().tolist(), size.flatten().tolist()
    ([6.0, 3.5, 8.0], [1.0, 4.0, 1.0])
    """
    n = metric.shape[1]
    limit = (n - int(class_token)) // 2
    if not 0 <= r <= limit:
        raise ValueError(f"cannot merge r={r} of {n} tokens (class_token={class_token}); give r from 0 to {limit}")
    batch, device = metric.shape[0], metric.device
    if r == 0:
        return TokenMerge(torch.arange(n, device=device).expand(batch, n), n)

    unit = normalize(metric.float(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, even, odd)
    if class_token:
        similarity[:, 0] = -torch.inf
    best, match = similarity.max(dim=-1)  # (B, even)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :r], order[:, r:]
    if class_token:
        kept = kept.sort(dim=1).values

    n_kept, n_odd = kept.shape[1], n // 2
    even_to = torch.empty_like(order)
    even_to.scatter_(1, kept, torch.arange(n_kept, device=device).expand_as(kept))
    even_to.scatter_(1, merged, n_kept + match.gather(1, merged))
    destination = torch.empty(batch, n, dtype=torch.long, device=device)
    destination[:, ::2] = even_to
    destination[:, 1::2] = n_kept + torch.arange(n_odd, device=device)
    return TokenMerge(destination, n_kept + n_odd)


def merge_list(n_patches: int, n_keep: int, n_blocks: int) -> list[int]:
    """How many tokens each block merges so that exactly `n_keep` of `n_patches` are left: even, the larger ones last.

    The lists behind "192, 128 and 64 tokens" in the 23 blocks that LLaVA-1.5 reads (docs/specs/baselines.md section 4):

    >>> for n_keep in (192, 128, 64):
    ...     merges = merge_list(576, n_keep, 23)
    ...     print({r: merges.count(r) for r in merges})
    {16: 7, 17: 16}
    {19: 12, 20: 11}
    {22: 17, 23: 6}

    A block merges at most half of what it has, so few blocks merge more early on:

    >>> merge_list(100, 11, 4)
    [28, 28, 22, 11]
    """
    if not 1 <= n_keep <= n_patches:
        raise ValueError(f"cannot keep n_keep={n_keep} of {n_patches} patches; give 1 to {n_patches}")
    if n_blocks < 1:
        raise ValueError(f"merging needs at least one block, got n_blocks={n_blocks}")
    merges: list[int] = []
    left, n_after = n_patches - n_keep, n_keep
    for blocks_left in range(n_blocks, 0, -1):  # from the last block back
        r = min(n_after, -(-left // blocks_left))
        merges.insert(0, r)
        left, n_after = left - r, n_after + r
    if left:
        least = -(-n_patches // 2**n_blocks)
        raise ValueError(
            f"{n_blocks} blocks cannot merge {n_patches} patches into n_keep={n_keep}: each at most halves them; "
            f"n_keep must be at least {least}, or use more blocks"
        )
    return merges


def halving_list(n_patches: int, n_keep: int) -> list[int]:
    """The fewest merges from `n_patches` to `n_keep`, halving while that fits; for merging after the tower.

    >>> halving_list(576, 192)                                  # 576 -> 288 -> 192
    [288, 96]
    """
    if not 1 <= n_keep <= n_patches:
        raise ValueError(f"cannot keep n_keep={n_keep} of {n_patches} patches; give 1 to {n_patches}")
    merges = []
    while n_patches > n_keep:
        merges.append(min(n_patches // 2, n_patches - n_keep))
        n_patches -= merges[-1]
    return merges


def patches_after(n_patches: int, merges: Sequence[int]) -> int:
    """Patches left after a merge list; ValueError names the first block that is asked for more than half of its own.

    >>> patches_after(576, [16] * 7 + [17] * 16)
    192
    """
    for block, r in enumerate(merges):
        if not 0 <= r <= n_patches // 2:
            raise ValueError(
                f"block {block} is asked to merge {r} of {n_patches} patches; it can merge 0 to {n_patches // 2} "
                f"(merges={list(merges)})"
            )
        n_patches -= r
    return n_patches


@dataclass(frozen=True)
class ContextualMerge:
    """tokens (B, C, D); source (B, C, N) of 0 and 1, the tokens that went into each."""

    tokens: Tensor
    source: Tensor


def contextual_merge(x: Tensor, metric: Tensor, n_contextual: int) -> ContextualMerge:
    """VisionZip's second half: x (B, N, D), what was not dominant -> (B, n_contextual, D).

    Every (N // n_contextual)-th token is a target; each other token joins the target its metric (B, N, M) points to
    most. A result is its target *plus* the mean of those who joined: a sum of two terms, as in the released
    code (the paper says average), so it has about twice the scale of a patch.

    >>> x = torch.tensor([[[1.0], [2.0], [3.0], [5.0]]])
    >>> metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.0]]])
    >>> merged = contextual_merge(x, metric, 2)                 # targets 0 and 2; tokens 1 and 3 are like 0
    >>> merged.tokens.flatten().tolist(), merged.source[0].int().tolist()
    ([4.5, 3.0], [[1, 1, 0, 1], [0, 0, 1, 0]])
    """
    n = x.shape[1]
    if not 0 <= n_contextual <= n:
        raise ValueError(f"cannot make n_contextual={n_contextual} tokens from the {n} left over; give 0 to {n}")
    if n_contextual == 0:
        return ContextualMerge(x[:, :0], metric.new_zeros(x.shape[0], 0, n, dtype=torch.float32))
    target = torch.arange(n_contextual, device=x.device) * (n // n_contextual)
    unit = normalize(metric.float(), dim=-1)
    joins = (unit @ unit[:, target].transpose(1, 2)).argmax(dim=-1)  # (B, N)
    assigned = one_hot(joins, n_contextual).transpose(1, 2).to(torch.float32)  # (B, C, N)
    assigned[:, :, target] = 0
    count = assigned.sum(dim=-1, keepdim=True).clamp(min=1)
    tokens = x[:, target] + ((assigned / count) @ x.float()).to(x.dtype)
    assigned[:, torch.arange(n_contextual, device=x.device), target] = 1
    return ContextualMerge(tokens, assigned)
