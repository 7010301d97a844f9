"""Finite scalar quantization: every channel is rounded to one of a few levels, and gradients pass straight through.

Source:  Mentzer et al., ICLR 2024, arXiv:2309.15505, appendix A (bound, round, straight through).
Differs: levels are plain numbers, not buffers; no indices are made, since nothing here needs them.

No codebook is learnt and no loss is added, so a code can be learnt by whatever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MARGIN = 1e-3  # of the bound, so that its ends can be reached


def finite_scalar(z: Tensor, levels: Sequence[int]) -> Tensor:
    """(..., len(levels)) -> the same shape, in [-1, 1]: channel i takes levels[i] different values.

    ValueError where the channels are not as many as the levels, or a channel has fewer than two.

    >>> finite_scalar(torch.tensor([[-9.0, -9.0], [0.0, 0.0], [9.0, 9.0]]), [3, 4]).tolist()
    [[-1.0, -1.0], [0.0, 0.0], [1.0, 0.5]]
    """
    if z.shape[-1] != len(levels) or any(level < 2 for level in levels):
        raise ValueError(f"{z.shape[-1]} channels and levels {list(levels)}; give one number of at least 2 for each channel")
    halves, offsets, shifts = [], [], []
    for level in levels:
        halves.append((level - 1) * (1 + MARGIN) / 2)
        offsets.append(0.5 if level % 2 == 0 else 0.0)
        shifts.append(math.atanh(offsets[-1] / halves[-1]))
    half, offset, shift = (torch.tensor(numbers, dtype=z.dtype, device=z.device) for numbers in (halves, offsets, shifts))
    bounded = torch.tanh(z + shift) * half - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    return rounded / torch.tensor([level // 2 for level in levels], dtype=z.dtype, device=z.device)
