"""Rotary positions: move stored keys to another place, and number the tokens of a prompt with images.

Source:  RoFormer section 3.2.2 (rotations compose); HTC-VLM gives text after an image the position 581 onward.
Differs: `compact` numbering is ours: visual tokens never meet the text, so they may share positions with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from htc_vlm.tokens import TokenLayout

POSITIONS = ("sequential", "compact")


def rotate_keys(keys: Tensor, inv_freq: Tensor, shift: Tensor) -> Tensor:
    """Turn keys that were rotated for position p into keys for position p + shift, exactly.

    keys (B, ..., head_dim), already rotated; inv_freq (head_dim / 2,); shift (B,) integers -> same shape as keys.
    Computed in float32, returned in the dtype of `keys`. Llama's half-split layout: pairs are (i, i + head_dim / 2).

    >>> keys = torch.tensor([[1.0, 0.0]])
    >>> rotate_keys(keys, torch.tensor([1.0]), torch.tensor([0])).tolist()
    [[1.0, 0.0]]
    >>> there = rotate_keys(keys, torch.tensor([1.0]), torch.tensor([7]))
    >>> torch.allclose(rotate_keys(there, torch.tensor([1.0]), torch.tensor([-7])), keys, atol=1e-6)
    True
    """
    half = keys.shape[-1] // 2
    if inv_freq.shape[0] != half:
        raise ValueError(f"keys have {half} frequency pairs, inv_freq has {inv_freq.shape[0]}; use the model's own")
    angle = shift.to(torch.float32)[:, None] * inv_freq.to(torch.float32)[None, :]  # (B, head_dim / 2)
    angle = angle.view(angle.shape[0], *(1,) * (keys.ndim - 2), half)
    cos, sin = angle.cos(), angle.sin()
    first, second = keys[..., :half].float(), keys[..., half:].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(keys.dtype)


def position_ids(layout: TokenLayout, positions: str = "sequential") -> Tensor:
    """(B, L) rotary position of each token. Padding gets 0 and does not count.

    `sequential` counts every token. `compact` lets an image cost only its bottleneck tokens: its visual tokens take
    the positions just before the bottleneck (below zero where needed; only differences matter to RoPE).
    Each packed question starts at the position after the shared part.

    >>> layout = TokenLayout.from_string("ptvvbt")
    >>> position_ids(layout).tolist()
    [[0, 0, 1, 2, 3, 4]]
    >>> position_ids(layout, "compact").tolist()
    [[0, 0, -1, 0, 1, 2]]
    >>> packed = TokenLayout.from_kind(torch.tensor([[1, 1, 1, 1, 1]]), question=torch.tensor([[0, 1, 1, 2, 2]]))
    >>> position_ids(packed).tolist()
    [[0, 1, 2, 1, 2]]
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; known: {', '.join(POSITIONS)}")
    costs = ~layout.is_padding
    if positions == "compact":
        costs = costs & ~layout.is_visual
    ids = costs.long().cumsum(dim=1) - 1  # position of this token
    if positions == "compact":
        ids = torch.where(layout.is_visual, ids + 1 - _visual_left(layout), ids)
    ids = ids - _length_of_earlier_questions(layout, costs)
    return ids.masked_fill(layout.is_padding, 0)


def around_image(n_visual: int, n_after: int, visual: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """(axes, L) positions of [visual tokens; what follows them, from 0]. visual (axes, n_visual): None counts up to -1.

    What follows has equal positions on all axes (M-RoPE: time, row, column), so one rotation moves it.

    >>> around_image(2, 2).tolist(), around_image(2, 1, torch.tensor([[-2, -2], [-2, -1]])).tolist()
    ([[-2, -1, 0, 1]], [[-2, -2, 0], [-2, -1, 0]])
    """
    before = torch.arange(-n_visual, 0, device=device)[None] if visual is None else visual
    after = torch.arange(n_after, device=before.device).expand(before.shape[0], -1)
    return torch.cat((before, after), dim=1)


def for_rows(ids: Tensor, n_rows: int) -> Tensor:
    """(axes, L) -> position ids of n_rows alike: (n_rows, L), or (axes, n_rows, L) where there are several axes."""
    return ids[0].expand(n_rows, -1) if ids.shape[0] == 1 else ids[:, None].expand(-1, n_rows, -1)


def with_images(layout: TokenLayout, visual: Sequence[Tensor], costs: Sequence[int]) -> Tensor:
    """(axes, B, L) positions of prompts whose images say where their own tokens stand.

    visual: of each image in order of appearance (axes, C), with its bottleneck at 0; costs: positions that each takes of the
    prompt's numbering before its bottleneck. Padding gets 0.

    >>> layout = TokenLayout.from_string("ptvvbt")
    >>> with_images(layout, [torch.tensor([[-2, -1]])], [2]).tolist() == [position_ids(layout).tolist()]
    True
    >>> with_images(layout, [torch.tensor([[-1, -1], [-1, 0]])], [1]).tolist()
    [[[0, 0, 1, 1, 2, 3]], [[0, 0, 1, 2, 2, 3]]]
    """
    counts = ~layout.is_padding & ~layout.is_visual
    before = torch.nn.functional.pad(layout.image, (1, 0))[:, :-1]
    starts = layout.is_visual & (layout.image != before)
    cost = torch.zeros_like(layout.kind)
    cost[starts] = torch.tensor(list(costs), device=cost.device, dtype=cost.dtype)
    ids = (counts.long() + cost).cumsum(dim=1) - 1  # at a visual token: that of the bottleneck, less 1
    ids = ids.masked_fill(layout.is_padding, 0)
    axes = visual[0].shape[0] if visual else 1
    out = ids.expand(axes, -1, -1).clone()
    if visual:
        out[:, layout.is_visual] = ids[layout.is_visual] + 1 + torch.cat(list(visual), dim=1).to(ids.device)
    return out


def _visual_left(layout: TokenLayout) -> Tensor:
    """(B, L): for a visual token, how many visual tokens of its run are left, itself included; elsewhere 0."""
    count = layout.is_visual.long().flip(1).cumsum(dim=1).flip(1)  # visual tokens from here on
    return torch.where(layout.is_visual, count - _next_non_visual(count, layout.is_visual), 0)


def _next_non_visual(count: Tensor, is_visual: Tensor) -> Tensor:
    """(B, L): `count` read at the nearest non-visual token to the right; 0 past the end."""
    length = count.shape[1]
    here = torch.arange(length, device=count.device).expand_as(count)
    stop = torch.where(is_visual, torch.full_like(here, length), here)
    stop = stop.flip(1).cummin(dim=1).values.flip(1)  # (B, L) index, `length` if none
    padded = torch.nn.functional.pad(count, (0, 1))
    return padded.gather(1, stop)


def _length_of_earlier_questions(layout: TokenLayout, costs: Tensor) -> Tensor:
    """(B, L): positions used by packed questions before this token's own one."""
    question = layout.question
    own = (question > 0) & costs
    counted = own.long().cumsum(dim=1)  # question tokens up to here
    before = torch.nn.functional.pad(question, (1, 0))[:, :-1]
    starts = (question > 0) & (question != before)
    at_start = torch.where(starts, counted - own.long(), torch.zeros_like(counted))
    return torch.where(question > 0, at_start.cummax(dim=1).values, torch.zeros_like(counted))
