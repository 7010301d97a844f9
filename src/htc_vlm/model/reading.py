"""Read images apart from the text: R rows for each cache entry, in several looks; then run the text over the entries.

    visual tokens   one pass under the compressor's mask, keys and values of every layer kept
    each look       the rows, after all visual tokens, causal among themselves; the rows of one entry share its position
    the entries     keys and values of the last look, of each layer's heads the share that each row writes
    the text        sees the entries of its images, and itself

Source:  ours (compressors/readers.py); HTC-VLM Algorithm 1 and VoCo-LLaMA section 3 for compress, then text over the cache.
Differs: methods with one masked pass train on that (modeling.py). Here training runs these passes with gradients, so what is
         trained is what is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from htc_vlm.applied import hf_compat
from htc_vlm.compressors import Compressor
from htc_vlm.compressors.readers import join
from htc_vlm.model import adapter, fast_prefill
from htc_vlm.ops import masks, rope
from htc_vlm.tokens import PADDING, TEXT, TokenLayout


def read(
    language_model: Any,
    compressor: Compressor,
    visual: Tensor,
    n_entries: int,
    path: str = "auto",
    positions: Tensor | None = None,
    deep: Tensor | None = None,
) -> Tensor:
    """(N, C, D) visual tokens -> entries (N, layers, 2, kv heads, n_entries, head_dim), the first at position 0.

    positions (axes, C): of the visual tokens; None: counted up to -1. deep (n, N, C, D): what the first layers add to them.
    """
    fast = fast_prefill.takes_fast_path(path, language_model, compressor, visual.shape[1] + n_entries)
    fast = fast and not torch.is_grad_enabled()
    n_rows = n_entries * compressor.n_readers
    parts = []
    for chunk, deeper in fast_prefill.chunks(visual, deep, visual.shape[1]) if fast else [(visual, deep)]:
        out, _ = look(language_model, compressor, chunk, n_entries, fast, positions, deeper)
        parts.append(join(hf_compat.kv_from_cache(out.past_key_values, n_rows), compressor.n_readers))
    return torch.cat(parts)


def look(
    language_model: Any,
    compressor: Compressor,
    visual: Tensor,
    n_entries: int,
    fast: bool = False,
    positions: Tensor | None = None,
    deep: Tensor | None = None,
    **options: Any,
) -> tuple[Any, Tensor]:
    """All looks -> the output of the last one, with cache [visual; rows], and the rows' position ids (N, rows).

    This is where an adapter (model/adapter.py) is at work; the text runs without it.
    """
    with adapter.at_work(language_model):
        return _look(language_model, compressor, visual, n_entries, fast, positions, deep, options)


def _look(
    language_model: Any,
    compressor: Compressor,
    visual: Tensor,
    n_entries: int,
    fast: bool,
    positions: Tensor | None,
    deep: Tensor | None,
    options: dict[str, Any],
) -> tuple[Any, Tensor]:
    n_images, n_visual, _ = visual.shape
    if fast:
        kv = fast_prefill.visual_kv(language_model, visual, positions, deep)
    else:
        kv = _visual_kv(language_model, compressor, visual, positions, deep)
    rows_of = torch.arange(n_entries * compressor.n_readers, device=visual.device) // compressor.n_readers
    position_ids = rows_of.expand(n_images, -1)
    seen = torch.ones((n_images, n_visual + len(rows_of)), dtype=torch.long, device=visual.device)
    states, out = None, None
    for _ in range(compressor.n_looks):
        rows = compressor.reader_rows(n_entries, states).to(visual.dtype).expand(n_images, -1, -1)
        out = hf_compat.run_over_cache(
            language_model,
            hf_compat.cache_from_kv(kv[:, :, 0], kv[:, :, 1], n_images, language_model.config),
            lambda: adapter.at_work(language_model),
            inputs_embeds=rows,
            attention_mask=seen,
            position_ids=position_ids,
            **options,
        )
        states = out.last_hidden_state
    return out, position_ids


def _visual_kv(
    language_model: Any, compressor: Compressor, visual: Tensor, positions: Tensor | None, deep: Tensor | None
) -> Tensor:
    """(N, C, D) -> (N, layers, 2, kv heads, C, head_dim), the last visual token at position -1 where none are given."""
    n_images, n_visual, _ = visual.shape
    layout = TokenLayout.from_string("v" * n_visual)
    layout = TokenLayout.from_kind(layout.kind.to(visual.device).expand(n_images, -1))
    visible = compressor.visible(layout)
    if visible is None:
        visible = masks.packed_causal(layout)
    out = hf_compat.run_over_cache(
        language_model,
        DynamicCache(config=language_model.config),
        lambda: adapter.at_work(language_model),
        inputs_embeds=visual,
        attention_mask=hf_compat.ready_mask(language_model.config, visual, None, visible),
        position_ids=rope.for_rows(rope.around_image(n_visual, 0, positions, visual.device), n_images),
        **hf_compat.deep_features(layout.is_visual, deep),
    )
    return hf_compat.kv_from_cache(out.past_key_values, n_visual)


def attention(
    language_model: Any,
    compressor: Compressor,
    visual: Tensor,
    positions: Tensor | None = None,
    deep: Tensor | None = None,
) -> Tensor:
    """What each entry's rows looked at in the last look, mean over rows: (N, layers, H, K, C + K), rows sum to 1."""
    n_entries, n_readers = compressor.n_bottleneck, compressor.n_readers
    options: dict[str, Any] = {"positions": positions, "deep": deep, "output_hidden_states": True}
    out, position_ids = look(language_model, compressor, visual, n_entries, **options)
    seen = hf_compat.attention_of_last_rows(
        language_model, out.hidden_states, out.past_key_values, position_ids, n_entries * n_readers
    )
    n_visual = visual.shape[1]
    seen = seen.unflatten(3, (n_entries, n_readers)).mean(dim=4)  # (N, layers, H, K, C + rows)
    among = seen[..., n_visual:].unflatten(-1, (n_entries, n_readers)).sum(-1)
    return torch.cat((seen[..., :n_visual], among), dim=-1)


def budget(compressor: Compressor, training: bool) -> int:
    """How many entries an image gets in this pass: all, or, where nested budgets are trained, one drawn at random."""
    budgets = compressor.budgets
    return budgets[int(torch.randint(len(budgets), ()))] if training and len(budgets) > 1 else budgets[-1]


def of_budget(layout: TokenLayout, compressor: Compressor, training: bool) -> tuple[TokenLayout, int]:
    """How many entries an image gets in this pass (`budget`), and the layout with the bottleneck tokens of these alone."""
    n_entries = budget(compressor, training)
    if n_entries < compressor.n_bottleneck:
        layout = first_entries(layout, compressor.n_bottleneck, n_entries)
    return layout, n_entries


def first_entries(layout: TokenLayout, n_bottleneck: int, n_entries: int) -> TokenLayout:
    """The layout where each image has only its first n_entries bottleneck tokens; the others become padding.

    >>> first_entries(TokenLayout.from_string("vbbbbtvbbbbt"), 4, 2).to_strings()
    ['vbbpptvbbppt']
    """
    rank = (layout.is_bottleneck.long().cumsum(dim=1) - 1) % n_bottleneck
    surplus = layout.is_bottleneck & (rank >= n_entries)
    return TokenLayout.from_kind(layout.kind.masked_fill(surplus, PADDING), layout.question)


def run_text(
    language_model: Any, embeds: Tensor, layout: TokenLayout, position_ids: Tensor, kv: Tensor, **options: Any
) -> BaseModelOutputWithPast:
    """Run a batch's text over the entries of its images, in the places that `layout` gives both.

    embeds (B, L, D); kv (images, layers, 2, kv heads, entries, head_dim), in order of appearance. Returns the states at their
    places in (B, L, D), zeros elsewhere; no cache is kept. Attention maps have a column for each entry, then for each text
    token of the longest text.
    """
    n_entries, config = kv.shape[4], language_model.config
    text = _Moved.of(layout.is_text)
    is_first = layout.is_bottleneck & ((layout.is_bottleneck.long().cumsum(dim=1) - 1) % n_entries == 0)
    slots = _Moved.of(is_first)
    image = is_first.flatten().long().cumsum(dim=0).view_as(is_first) - 1  # of the first bottleneck tokens: whose they are
    mine = kv[slots.take(image.clamp_min(0)).flatten()]  # (B * slots, layers, 2, kv heads, entries, head_dim)
    inv_freq = language_model.rotary_emb.inv_freq.to(kv.device)
    keys = rope.rotate_keys(mine[:, :, 0], inv_freq, slots.take(position_ids).flatten())
    keys, values = (_join_slots(part, slots.order.shape[1]) for part in (keys, mine[:, :, 1]))
    cache = hf_compat.cache_from_kv(keys, values, len(embeds), config)
    inside = embeds.gather(1, text.order[..., None].expand(-1, -1, embeds.shape[-1]))
    options.pop("use_cache", None)
    out = hf_compat.run_over_cache(
        language_model,
        cache,
        inputs_embeds=inside,
        attention_mask=hf_compat.ready_mask(config, inside, None, _visible(text, slots, layout, n_entries), cache),
        position_ids=text.take(position_ids),
        **options,
    )
    out.past_key_values = None
    out.last_hidden_state = text.back(out.last_hidden_state, embeds.shape[1])
    if out.hidden_states is not None:
        out.hidden_states = tuple(text.back(states, embeds.shape[1]) for states in out.hidden_states)
    return out


@dataclass(frozen=True)
class _Moved:
    """The chosen tokens of a (B, L) batch, moved to the left. order, is_real (B, n): columns they come from; padding."""

    order: Tensor
    is_real: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> _Moved:
        n_most = max(1, int(chosen.sum(dim=1).max()))
        order = (~chosen).long().argsort(dim=1, stable=True)[:, :n_most]
        return cls(order, chosen.gather(1, order))

    def take(self, values: Tensor) -> Tensor:
        """(B, L) -> (B, n)"""
        return values.gather(1, self.order)

    def back(self, states: Tensor, length: int) -> Tensor:
        """(B, n, D) -> (B, length, D), zeros where no chosen token stands."""
        whole = states.new_zeros((states.shape[0], length, states.shape[2]))
        index = self.order[..., None].expand_as(states)
        return whole.scatter(1, index, states * self.is_real[..., None])


def _visible(text: _Moved, slots: _Moved, layout: TokenLayout, n_entries: int) -> Tensor:
    """(B, T, slots * n_entries + T): text sees the entries before it, and the text before it of its question."""
    before = (slots.order[:, None, :] < text.order[:, :, None]) & slots.is_real[:, None, :]
    kind = torch.where(text.is_real, TEXT, PADDING)
    own = masks.packed_causal(TokenLayout.from_kind(kind, text.take(layout.question)))
    itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)  # padding must see something
    return torch.cat((before.repeat_interleave(n_entries, dim=2), own | itself), dim=2)


def _join_slots(kv: Tensor, n_slots: int) -> Tensor:
    """(B * slots, layers, kv heads, K, head_dim) -> (B, layers, kv heads, slots * K, head_dim)"""
    return kv.unflatten(0, (-1, n_slots)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
