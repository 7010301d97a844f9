"""Choosing which tokens stay: by score, by diversity, at random; and packing what is left of a ragged batch.

Source:  DivPrune (CVPR 2025), greedy max-min selection of its released code; docs/specs/baselines.md sections 10 and 11.
Differs: ties go to the lowest index, everywhere (torch.topk leaves them open); DivPrune never picks a token twice (the
         released code can, when patches are identical).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


def keep_top(scores: Tensor, n_keep: int) -> Tensor:
    """(B, N) scores -> (B, n_keep) indices of the highest, ascending; among equals the lowest index wins.

    >>> keep_top(torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5]]), 3)
    tensor([[1, 2, 3]])
    """
    _check_keep(n_keep, scores.shape[-1])
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :n_keep].sort(dim=-1).values


def keep_diverse(x: Tensor, n_keep: int) -> Tensor:
    """(B, N, D) -> (B, n_keep) indices, ascending: greedily the token farthest from all that were chosen.

    Distance is 1 - cosine, in float32. The first is the token farthest from its nearest neighbour.

    >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.0]]])
    >>> keep_diverse(x, 2), keep_diverse(x, 3)
    (tensor([[0, 3]]), tensor([[0, 2, 3]]))
    """
    n = x.shape[1]
    _check_keep(n_keep, n)
    unit = normalize(x.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)  # (B, N, N)
    is_self = torch.eye(n, dtype=torch.bool, device=x.device)
    score = distance.masked_fill(is_self, torch.inf).amin(dim=-1)  # to the nearest neighbour
    nearest = torch.full_like(score, torch.inf)  # to the nearest chosen one
    chosen = []
    for _ in range(n_keep):
        index = score.argmax(dim=-1, keepdim=True)  # (B, 1); first among equals
        chosen.append(index)
        nearest = torch.minimum(nearest, distance.gather(1, index[..., None].expand(-1, 1, n)).squeeze(1))
        nearest = nearest.scatter(1, index, -torch.inf)  # never again
        score = nearest
    return torch.cat(chosen, dim=1).sort(dim=1).values


def keep_random(n: int, n_keep: int, seed: int) -> Tensor:
    """(n_keep,) distinct indices below n, ascending, the same on every device; the global random state is left alone.

    >>> torch.equal(keep_random(576, 64, seed=1), keep_random(576, 64, seed=1))
    True
    """
    _check_keep(n_keep, n)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:n_keep].sort().values


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, ...), index (B, C) -> (B, C, ...)."""
    index = index.view(*index.shape, *(1,) * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


@dataclass(frozen=True)
class LeftPadded:
    """index (B, L'): which old column stands in each column of the new sequence; is_real (B, L'): not padding."""

    index: Tensor
    is_real: Tensor


def pack_left_padded(is_kept: Tensor) -> LeftPadded:
    """(B, L) bool -> the kept columns of every sample, in order and flush right, as short as the longest needs.

    Columns that are not real point at a dropped column (a valid index) and must be masked.

    >>> packed = pack_left_padded(torch.tensor([[True, False, True, True], [False, True, False, True]]))
    >>> packed.index.tolist(), packed.is_real.int().tolist()
    ([[0, 2, 3], [2, 1, 3]], [[1, 1, 1], [0, 1, 1]])
    """
    longest = int(is_kept.sum(dim=1).max())
    if longest == 0:
        raise ValueError("nothing is kept in any sample of the batch; keep at least one token")
    order = is_kept.to(torch.uint8).argsort(dim=1, stable=True)  # dropped first, kept last
    index = order[:, order.shape[1] - longest :]
    return LeftPadded(index=index, is_real=is_kept.gather(1, index))


def _check_keep(n_keep: int, n: int) -> None:
    if not 1 <= n_keep <= n:
        raise ValueError(f"cannot keep n_keep={n_keep} of {n} tokens; give 1 to {n}")
