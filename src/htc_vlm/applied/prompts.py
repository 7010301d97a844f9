"""The sequence between two layers while visual tokens leave: what a method is shown, and what its decision makes of it.

Source:  FastV, PyramidDrop and SparseVLM as one mechanism (docs/specs/baselines.md sections 5-7, 11).
Differs: batches: tokens leave from every image of every sample at once, and what is ragged becomes left padding. Tensors
         in, tensors out; `pruning` runs the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from htc_vlm.compressors import AttentionView, Compressor, Keep, Merge
from htc_vlm.ops.select import gather_tokens, pack_left_padded
from htc_vlm.tokens import PADDING, TEXT, VISUAL, TokenLayout


@dataclass(frozen=True)
class Rows:
    """The sequence that enters a layer."""

    states: Tensor  # (B, N, D)
    is_real: Tensor  # (B, N) bool, not padding
    image: Tensor  # (B, N), 1, 2, ... through the whole batch; 0 = not visual
    is_query: Tensor  # (B, N) bool, its attention decides
    position: Tensor  # (B, N)


@dataclass(frozen=True)
class QueryRows:
    """attention (B, H, R, N), is_row (B, R), position (B, R) of the tokens whose attention decides."""

    attention: Tensor
    is_row: Tensor
    position: Tensor


def first_rows(
    method: Compressor,
    states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    image: Tensor,
    prompt_length: int | None,
) -> Rows:
    """The prompt as it enters layer 0."""
    batch, n = states.shape[:2]
    ones = torch.ones(batch, n, dtype=torch.bool, device=states.device)
    is_real = ones if attention_mask is None else attention_mask.bool()
    if position_ids is None:
        position_ids = torch.arange(n, device=states.device)[None]
    n_prompt = n if prompt_length is None else prompt_length
    kind = torch.where(image > 0, VISUAL, TEXT).masked_fill(~is_real, PADDING)
    layout = TokenLayout.from_kind(kind[:, :n_prompt])
    is_query = torch.zeros_like(is_real)
    is_query[:, :n_prompt] = method.queries(states[:, :n_prompt], layout)
    return Rows(states, is_real, image, is_query, position_ids.expand(batch, -1))


def image_columns(rows: Rows) -> Tensor:
    """(I, n_now): where the visual tokens of each image are, counted through the flattened batch."""
    image = rows.image.flatten()
    place = image.nonzero().squeeze(1)
    return place[image[place].argsort(stable=True)].view(int(image.max()), -1)


def last_position(rows: Rows) -> Tensor:
    """(B,), the position of each sample's last token."""
    column = torch.arange(rows.is_real.shape[1], device=rows.position.device).masked_fill(~rows.is_real, -1)
    return rows.position.gather(1, column.argmax(dim=1, keepdim=True)).squeeze(1)


def see(found: QueryRows, rows: Rows, columns: Tensor, n_patches: int, inv_freq: Tensor) -> AttentionView:
    """What a method is shown of each image."""
    n = rows.is_real.shape[1]
    sample, place = columns[:, 0] // n, columns % n  # (I,), (I, n_now)
    attention = found.attention[sample]  # (I, H, R, N)
    attention = attention.gather(3, place[:, None, None].expand(*attention.shape[:3], -1))
    position = rows.position.flatten()[columns]
    return AttentionView(
        n_patches=n_patches,
        attention=attention,
        is_row=found.is_row[sample],
        states=rows.states.flatten(0, 1)[columns],
        distance=found.position[sample][..., None] - position[:, None],
        inv_freq=inv_freq,
    )


def shrink(rows: Rows, decision: Keep | Merge, columns: Tensor, renumber: bool) -> Rows:
    """The sequence without the visual tokens that leave; merged ones take the first places of their image."""
    batch, n, width = rows.states.shape
    states = rows.states
    if isinstance(decision, Keep):
        stay = columns.gather(1, decision.positions)
    elif not renumber:
        raise ValueError("merged tokens have no position of their own; use Merge with PruneStep(renumber=True)")
    else:
        stay = columns[:, : decision.weights.shape[1]]
        flat = states.reshape(batch * n, width)
        merged = (decision.weights.float() @ flat[columns].float()).to(states.dtype)
        states = flat.index_copy(0, stay.flatten(), merged.flatten(0, 1)).view(batch, n, width)
    is_kept = rows.is_real.flatten().clone()
    is_kept[columns.flatten()] = False
    is_kept[stay.flatten()] = True
    packed = pack_left_padded(is_kept.view(batch, n))
    renumbered = packed.is_real.long().cumsum(dim=1).sub(1).clamp(min=0)
    position = renumbered if renumber else rows.position.gather(1, packed.index)
    return Rows(
        states=gather_tokens(states, packed.index),
        is_real=packed.is_real,
        image=rows.image.gather(1, packed.index) * packed.is_real,
        is_query=rows.is_query.gather(1, packed.index) & packed.is_real,
        position=position,
    )


def provenance(source: Tensor, decision: Keep | Merge) -> Tensor:
    """source (I, n_before, P) -> (I, n_now, P): the share of each patch's place in each token."""
    if isinstance(decision, Merge):
        return decision.weights @ source
    return gather_tokens(source, decision.positions)
