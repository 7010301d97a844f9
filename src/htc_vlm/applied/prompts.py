"""Removes visual tokens from a batch of prompts: which columns are whose, what a method is shown, what stays.

Source:  FastV, PyramidDrop and SparseVLM as one mechanism (docs/specs/baselines.md sections 5-7, 11).
Differs: batches: tokens leave from every image of every sample at once, and what is ragged becomes left padding. Images
         with equally many tokens form a group, which one tensor operation serves. Positions may have several axes in
         front (M-RoPE); then every token keeps its own. Tensors in, tensors out; `door` and `pruning` run the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from htc_vlm.compressors import AttentionView, Compressor, Keep, Merge
from htc_vlm.ops.select import LeftPadded, gather_tokens, pack_left_padded
from htc_vlm.tokens import PADDING, TEXT, VISUAL, TokenLayout


@dataclass(frozen=True)
class Group:
    """The images of a batch that came with n_patches tokens each. images (I,): their numbers, from 1, ascending."""

    n_patches: int
    images: Tensor


@dataclass(frozen=True)
class Rows:
    """The sequence that enters a layer."""

    states: Tensor  # (B, N, D)
    is_real: Tensor  # (B, N) bool, not padding
    image: Tensor  # (B, N), 1, 2, ... through the whole batch; 0 = not visual
    is_query: Tensor  # (B, N) bool, its attention decides
    position: Tensor  # (B, N), or (axes, B, N)
    deep: Tensor | None = None  # (n, B, N, D), added to what the first n layers give (DeepStack); 0 for text


@dataclass(frozen=True)
class QueryRows:
    """attention (B, H, R, N), is_row (B, R), position (B, R) of the tokens whose attention decides."""

    attention: Tensor
    is_row: Tensor
    position: Tensor


@dataclass(frozen=True)
class Change:
    """What becomes of a group. columns (I, n_now): where its tokens are, counted through the flattened batch."""

    columns: Tensor
    decision: Keep | Merge


def number_images(input_ids: Tensor, image_token_id: int, lengths: Sequence[int] | None) -> Tensor:
    """(B, L) ids -> (B, L): 1, 2, ... for the placeholders of the first, second, ... image of the batch, else 0.

    lengths: tokens of each image, in order, where they are known; otherwise, and where one of them would reach over
    text, an image is a run of placeholders.

    >>> ids = torch.tensor([[9, 9, 1, 9, 9]])
    >>> number_images(ids, 9, [2, 2]), number_images(ids, 9, [4]), number_images(ids, 9, [1, 1, 2])
    (tensor([[1, 1, 0, 2, 2]]), tensor([[1, 1, 0, 2, 2]]), tensor([[1, 2, 0, 3, 3]]))
    """
    is_visual = input_ids == image_token_id
    before = torch.nn.functional.pad(is_visual, (1, 0))[:, :-1]
    run = ((is_visual & ~before).flatten().long().cumsum(dim=0)).view_as(input_ids) * is_visual
    if lengths is None:
        return run
    total = int(is_visual.sum())
    if total != sum(lengths):
        raise ValueError(
            f"the prompts have {total} image placeholders for {len(lengths)} images with {sum(lengths)} tokens; "
            "let the processor expand them"
        )
    counts = torch.tensor(list(lengths), device=input_ids.device)
    number = torch.arange(1, len(counts) + 1, device=input_ids.device).repeat_interleave(counts)
    runs = run[is_visual]
    if bool(((number[1:] == number[:-1]) & (runs[1:] != runs[:-1])).any()):
        return run
    return torch.zeros_like(input_ids).masked_scatter(is_visual, number)


MARK_TOKENS = 16  # of the marks around a tile, at most


def join_tiles(input_ids: Tensor, image: Tensor) -> Tensor:
    """`number_images` with the tiles of a picture as one image, where marks stand between them: (B, L) -> (B, L).

    The same mark opens each tile and closes the picture, so that there is one between two tiles and there are two between
    pictures (SmolVLM, Idefics3). Prompts without such marks stay as they are.

    >>> ids = torch.tensor([[7, 9, 9, 7, 9, 9, 7, 7, 9, 9, 7, 1]])
    >>> join_tiles(ids, number_images(ids, 9, [2, 2, 2]))
    tensor([[0, 1, 1, 0, 1, 1, 0, 0, 2, 2, 0, 0]])
    """
    number, renamed = 0, torch.zeros(int(image.max()) + 1, dtype=image.dtype, device=image.device)
    for ids, row in zip(input_ids.tolist(), image.tolist(), strict=True):
        tiles = {tile: (row.index(tile), len(row) - row[::-1].index(tile)) for tile in dict.fromkeys(row) if tile}
        mark, end = closing_mark(ids, list(tiles.values())), None
        for tile, (first, behind) in tiles.items():
            between: list[int] = [] if end is None else ids[end:first]
            is_same = mark is not None and len(between) <= MARK_TOKENS and between.count(mark) == 1
            number += not is_same
            renamed[tile], end = number, behind
    return renamed[image]


def closing_mark(ids: Sequence[int], tiles: Sequence[tuple[int, int]]) -> int | None:
    """The token behind a prompt's last tile, if the first tile was opened by it, too. tiles: (first, behind) of each."""
    if not tiles or tiles[-1][1] == len(ids):
        return None
    mark, first = ids[tiles[-1][1]], tiles[0][0]
    return mark if mark in ids[max(0, first - MARK_TOKENS) : first] else None


def groups_of(image: Tensor, apart: bool = False) -> list[Group]:
    """(B, N) numbers of images -> images with equally many tokens together, in order of appearance; or each `apart`.

    >>> [(group.n_patches, group.images.tolist()) for group in groups_of(torch.tensor([[1, 1, 2, 0, 3, 3]]))]
    [(2, [1, 3]), (1, [2])]
    """
    counts = image.flatten().bincount()[1:]
    if apart:
        return [Group(n, torch.tensor([i + 1], device=image.device)) for i, n in enumerate(counts.tolist())]
    distinct = list(dict.fromkeys(counts.tolist()))
    return [Group(n, (counts == n).nonzero().squeeze(1) + 1) for n in distinct]


def image_columns(image: Tensor, group: Group) -> Tensor:
    """(I, n_now): where the visual tokens of each image of a group are, counted through the flattened batch."""
    flat = image.flatten()
    place = torch.isin(flat, group.images).nonzero().squeeze(1)
    return place[flat[place].argsort(stable=True)].view(len(group.images), -1)


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
    layout = layout_of(image, is_real, n_prompt)
    is_query = torch.zeros_like(is_real)
    is_query[:, :n_prompt] = method.queries(states[:, :n_prompt], layout)
    return Rows(states, is_real, image, is_query, position_ids.expand(*position_ids.shape[:-2], batch, -1))


def layout_of(image: Tensor, is_real: Tensor, n_prompt: int) -> TokenLayout:
    """What the first n_prompt columns are."""
    kind = torch.where(image > 0, VISUAL, TEXT).masked_fill(~is_real, PADDING)
    return TokenLayout.from_kind(kind[:, :n_prompt])


def last_position(rows: Rows) -> Tensor:
    """(B,), the position of each sample's last token; 0 with several axes, where nothing is renumbered."""
    if rows.position.ndim == 3:
        return torch.zeros_like(rows.position[0, :, 0])
    column = torch.arange(rows.is_real.shape[1], device=rows.position.device).masked_fill(~rows.is_real, -1)
    return rows.position.gather(1, column.argmax(dim=1, keepdim=True)).squeeze(1)


def see(found: QueryRows, rows: Rows, columns: Tensor, n_patches: int, inv_freq: Tensor) -> AttentionView:
    """What a method is shown of each image of a group."""
    n = rows.is_real.shape[1]
    sample, place = columns[:, 0] // n, columns % n  # (I,), (I, n_now)
    attention = found.attention[sample]  # (I, H, R, N)
    attention = attention.gather(3, place[:, None, None].expand(*attention.shape[:3], -1))
    position = first_axis(rows.position).flatten()[columns]
    return AttentionView(
        n_patches=n_patches,
        attention=attention,
        is_row=found.is_row[sample],
        states=rows.states.flatten(0, 1)[columns],
        distance=found.position[sample][..., None] - position[:, None],
        inv_freq=inv_freq,
    )


def shrink(rows: Rows, changes: Sequence[Change], renumber: bool) -> Rows:
    """The sequence without the visual tokens that leave; merged ones take the first places of their image."""
    batch, n = rows.states.shape[:2]
    states, deep = rows.states, rows.deep
    is_kept = rows.is_real.flatten().clone()
    source = torch.arange(batch * n, device=states.device)  # whose position each column takes, where all keep theirs
    keeps_positions = rows.position.ndim == 3
    for change in changes:
        decision, columns = change.decision, change.columns
        if isinstance(decision, Keep):
            stay = columns.gather(1, decision.positions)
        elif not (renumber or keeps_positions):
            raise ValueError("merged tokens have no position of their own; use Merge with PruneStep(renumber=True)")
        else:
            stay = columns[:, : decision.weights.shape[1]]
            source[stay] = columns.gather(1, first_largest(decision.weights))
            states = merged_into(states, columns, decision.weights, stay)
            deep = None if deep is None else torch.stack([merged_into(x, columns, decision.weights, stay) for x in deep])
        is_kept[columns.flatten()] = False
        is_kept[stay.flatten()] = True
    packed = pack_left_padded(is_kept.view(batch, n))
    if keeps_positions:
        position = take_positions(rows.position, packed, source)
    else:
        position = renumbered(packed) if renumber else rows.position.gather(1, packed.index)
    return Rows(
        states=gather_tokens(states, packed.index),
        is_real=packed.is_real,
        image=rows.image.gather(1, packed.index) * packed.is_real,
        is_query=rows.is_query.gather(1, packed.index) & packed.is_real,
        position=position,
        deep=None if deep is None else torch.stack([gather_tokens(x, packed.index) for x in deep]),
    )


def merged_into(states: Tensor, columns: Tensor, weights: Tensor, stay: Tensor) -> Tensor:
    """states (B, N, D) with `weights` @ the tokens at `columns` written to `stay`."""
    flat = states.flatten(0, 1)
    merged = (weights.float() @ flat[columns].float()).to(states.dtype)
    return flat.index_copy(0, stay.flatten(), merged.flatten(0, 1)).view_as(states)


def take_positions(position: Tensor, packed: LeftPadded, source: Tensor) -> Tensor:
    """(axes, B, N) -> (axes, B, N'): each token with the position of the column that `source` (B * N,) names for it."""
    n_axes, batch, n = position.shape
    flat = packed.index + torch.arange(batch, device=position.device)[:, None] * n
    return position.flatten(1)[:, source[flat].flatten()].view(n_axes, batch, -1)


def renumbered(packed: LeftPadded) -> Tensor:
    """(B, N') positions 0, 1, ... of the tokens that are real."""
    return packed.is_real.long().cumsum(dim=1).sub(1).clamp(min=0)


def first_axis(position: Tensor) -> Tensor:
    """(B, N) of (B, N) or (axes, B, N)."""
    return position[0] if position.ndim == 3 else position


def first_largest(weights: Tensor) -> Tensor:
    """(..., C, P) -> (..., C): the first of the columns with the largest weight.

    >>> first_largest(torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]))
    tensor([1, 0])
    """
    place = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
    is_largest = weights == weights.amax(dim=-1, keepdim=True)
    return place.masked_fill(~is_largest, weights.shape[-1]).amin(dim=-1)


def source_after(source: Tensor, decision: Keep | Merge) -> Tensor:
    """source (I, n_before, P) -> (I, n_now, P): the share of each patch's place in each token."""
    if isinstance(decision, Merge):
        return decision.weights @ source
    return gather_tokens(source, decision.positions)
