"""The decoder's door: visual tokens leave, or are replaced, between a model's embeddings and its first layer.

Source:  transformers 5.23, the contract between a vision-language model and its decoder: inputs_embeds, a 2-D mask,
         position_ids, a cache (read and tested in seven families); docs/specs/baselines.md section 12.
Differs: nothing of a family is named here. The prompt stays as the processor made it; the decoder sees less of it, and what
         was cut is remembered for each cache, so that decoding, beams and masks of the whole prompt still fit. With one
         axis of positions what is left is numbered anew, as if the prompt had been written so; with M-RoPE each token
         keeps its place in the picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from htc_vlm.applied.prompts import (
    Group,
    first_largest,
    groups_of,
    image_columns,
    join_tiles,
    merged_into,
    number_images,
    renumbered,
    take_positions,
)
from htc_vlm.compressors import Compressor, ImageFeatures
from htc_vlm.ops.select import LeftPadded, gather_tokens, pack_left_padded


@dataclass(frozen=True)
class Past:
    """What decoding needs to know of a prefill; one entry per layer, the same tensor where nothing left in between."""

    n_columns: int  # of the prompt's mask
    is_real: tuple[Tensor, ...]  # (B, length of this layer's cache)
    shift: tuple[Tensor, ...]  # (B,), by how much positions are smaller than without renumbering


@dataclass
class Prompt:
    """What the model is reading now."""

    input_ids: Tensor
    length: int | None  # columns after it are an answer, which takes no part in the choice
    encoded: Any = None  # what get_image_features gave

    def lengths(self) -> list[int] | None:
        """Tokens of each image, in order; None where the features do not tell."""
        found = getattr(self.encoded, "pooler_output", None)
        return [len(one) for one in found] if isinstance(found, (list, tuple)) else None


@dataclass
class Run:
    """State of a method while it is applied: how it acts, what each cache went through, what happened last."""

    method_of: Callable[[int], Compressor]  # the method for an image of so many tokens
    image_token_id: int
    n_nominal: int  # tokens of an image, or a number that stands for any
    in_place: int | None = None  # images of so many tokens have the method's in their first places (LLaVA)
    has_axes: bool = False  # M-RoPE
    has_tile_marks: bool = False  # the prompt has marks between the tiles of a picture
    is_one_picture: bool = False  # each prompt has one picture, whatever its marks
    grid_matters: bool = False
    grid_of: Callable[[int, Tensor | None], tuple[int, int] | None] = lambda n, position: None
    prompt: Prompt | None = None
    prompt_length: int | None = None  # of the prompt that is being answered (generate)
    has_positions: bool = False  # did the caller give position_ids?
    past: WeakKeyDictionary[Cache, Past] = field(default_factory=WeakKeyDictionary)
    cut: LeftPadded | None = None  # the last one
    seen: list[tuple[Group, ImageFeatures | None, Compressor]] = field(default_factory=list)

    def is_done(self, group: Group) -> bool:
        """Do the images have as many tokens as the method gives already, because the prompt was made for it?"""
        return self.in_place is not None and group.n_patches != self.in_place

    def numbers(self) -> Tensor:
        """(B, L) which image each column of the prompt belongs to."""
        assert self.prompt is not None
        ids = self.prompt.input_ids
        found = number_images(ids, self.image_token_id, self.prompt.lengths())
        if self.is_one_picture:
            return (found > 0) * torch.arange(1, len(ids) + 1, device=ids.device)[:, None]
        return join_tiles(ids, found) if self.has_tile_marks else found


class Door(nn.Module):
    """Mixed in front of the decoder's class while a method before the language model is applied."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's."""
        run: Run = self.__dict__["_run"]
        cache = kwargs.get("past_key_values")
        past = None if cache is None else run.past.get(cache)
        if run.prompt is None:
            return super().forward(*args, **(kwargs if past is None else continued(run, past, kwargs)))
        check_prompt(run.method_of(run.n_nominal).name, cache, kwargs.get("attention_mask"))
        states, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        changed, found = self._entered(run, states, mask, kwargs)
        out = super().forward(*args, **changed)
        if found is not None and getattr(out, "past_key_values", None) is not None:
            run.past[out.past_key_values] = found
        return out

    def _entered(
        self, run: Run, states: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Past | None]:
        """The decoder's arguments after the method has acted, and what is to be remembered of it."""
        image, position = run.numbers(), kwargs.get("position_ids")
        is_real = torch.ones_like(image, dtype=torch.bool) if mask is None else mask.bool()
        stay, source = is_real.flatten().clone(), torch.arange(image.numel(), device=states.device)
        deep = dense(kwargs)
        run.cut, run.seen, leave = None, [], False
        for group in groups_of(image, apart=run.grid_matters):
            columns, method = image_columns(image, group), run.method_of(group.n_patches)
            n_wanted = group.n_patches if run.is_done(group) else method.n_visual(group.n_patches)
            if run.in_place is not None:
                run.seen.append((group, None, method))
            else:
                images = features_of(run, states, columns, position)
                tokens = checked(method, method.before_llm(images), n_wanted)
                run.seen.append((group, images, method))
                first = columns[:, :n_wanted]
                if run.has_axes or deep is not None:
                    weights = shares(method, images)
                    source[first] = columns.gather(1, first_largest(weights))
                    deep = None if deep is None else torch.stack([merged_into(x, columns, weights, first) for x in deep])
                states = states.flatten(0, 1).index_copy(0, first.flatten(), tokens.flatten(0, 1)).view_as(states)
            stay[columns[:, n_wanted:].flatten()] = False
            leave |= n_wanted < group.n_patches
        if not leave:
            return {**kwargs, "inputs_embeds": states, **sparse(kwargs, deep)}, None
        packed = run.cut = pack_left_padded(stay.view_as(image))
        changed = {**kwargs, "inputs_embeds": gather_tokens(states, packed.index)}
        changed |= sparse(kwargs, deep, packed)
        everything = bool(packed.is_real.all())
        # Without a mask, positions with gaps would be taken for packed sequences.
        changed["attention_mask"] = None if mask is None and everything and not run.has_axes else packed.is_real.long()
        shift = torch.full((len(image),), image.shape[1] - packed.index.shape[1], device=states.device)
        if position is not None:
            changed["position_ids"] = new_positions(position, packed, source, run.has_axes)
            if not run.has_axes:
                shift = last(position.expand(len(image), -1), is_real) - last(changed["position_ids"], packed.is_real)
        return changed, Past(image.shape[1], (packed.is_real,), (shift,))


def features_of(run: Run, states: Tensor, columns: Tensor, position: Tensor | None) -> ImageFeatures:
    """A group's tokens as the decoder was to get them: they are projected already."""
    n, place = states.shape[1], None
    if run.has_axes and position is not None:
        place = position[..., columns // n, columns % n]
    grid = run.grid_of(columns.shape[1], place) if run.grid_matters else None
    return ImageFeatures(features=states.flatten(0, 1)[columns], project=lambda tokens: tokens, grid=grid)


def shares(method: Compressor, images: ImageFeatures) -> Tensor:
    """(I, C, P), rows that sum to 1 (or 0): what each token is made of. ValueError where the method does not tell."""
    source = method.source(images)
    if source is None:
        raise ValueError(
            f"{method.name} does not tell from which patches its tokens come, which M-RoPE and deep visual features need; "
            "give it a `source`, or use a method that has one: divprune, random_drop, tome"
        )
    return source / source.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def dense(kwargs: dict[str, Any]) -> Tensor | None:
    """DeepStack's features, laid out like the sequence: (n, B, L, D), 0 for text. None where there are none."""
    deep, is_visual = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if deep is None or is_visual is None:
        return None
    like = kwargs["inputs_embeds"]
    return torch.stack([torch.zeros_like(like).masked_scatter(is_visual[..., None], one.to(like.dtype)) for one in deep])


def sparse(kwargs: dict[str, Any], deep: Tensor | None, packed: LeftPadded | None = None) -> dict[str, Any]:
    """`dense` undone, of the columns that are left."""
    if deep is None:
        return {}
    is_visual: Tensor = kwargs["visual_pos_masks"]
    if packed is not None:
        is_visual = is_visual.gather(1, packed.index) & packed.is_real
        deep = torch.stack([gather_tokens(one, packed.index) for one in deep])
    return {"visual_pos_masks": is_visual, "deepstack_visual_embeds": [one[is_visual] for one in deep]}


def new_positions(position: Tensor, packed: LeftPadded, source: Tensor, has_axes: bool) -> Tensor:
    """position_ids of what is left: numbered anew, or with several axes each token's own (text order, first of four
    axes, is numbered anew)."""
    batch = packed.index.shape[0]
    position = position.expand(*position.shape[:-2], batch, -1)
    if not has_axes:
        return renumbered(packed)
    if position.ndim == 2:
        position = position[None]
    taken = take_positions(position, packed, source)
    if len(taken) == 4:
        taken = torch.cat((renumbered(packed)[None].to(taken), taken[1:]))
    return taken


def last(position: Tensor, is_real: Tensor) -> Tensor:
    """(B,), the position of each sample's last real token."""
    column = torch.arange(is_real.shape[1], device=position.device).masked_fill(~is_real, -1)
    return position.gather(1, column.argmax(dim=1, keepdim=True)).squeeze(1)


def continued(run: Run, past: Past, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's arguments for new tokens over a cache of a prompt that was cut."""
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    n_new = kwargs["inputs_embeds"].shape[1]
    n_done = int(kwargs["past_key_values"].get_seq_length()) - past.is_real[0].shape[1]
    changed = dict(kwargs)
    if mask is not None or not bool(past.is_real[0].all()):
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"a prompt that was cut takes a 2-D attention_mask, got {mask.ndim}-D")
        ones = torch.ones(len(past.is_real[0]), n_done + n_new, dtype=torch.bool, device=past.is_real[0].device)
        is_new = ones if mask is None else mask[:, past.n_columns :].bool()
        changed["attention_mask"] = torch.cat((past.is_real[0], is_new), dim=1).long()
    if position is None:
        return changed
    if run.has_axes:
        if not run.has_positions:  # counted by the model, from the cache that is shorter than the prompt
            changed["position_ids"] = position + past.n_columns - past.is_real[0].shape[1]
    else:
        changed["position_ids"] = position - past.shift[0][:, None]
    return changed


def checked(method: Compressor, tokens: Tensor, n_wanted: int) -> Tensor:
    """(I, C, D), if they are as many as promised."""
    if tokens.shape[1] != n_wanted:
        raise ValueError(f"{method.name} promised {n_wanted} visual tokens and gave {tokens.shape[1]}")
    return tokens


def check_prompt(name: str, cache: Cache | None, mask: Any) -> None:
    """ValueError for a prompt that cannot be cut."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        shape = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} cuts the prompt; give a 2-D attention_mask, got {shape}")
    if cache is not None and int(cache.get_seq_length()):
        raise ValueError(f"{name}: images after a cached prompt; give the whole conversation at once")


@functools.cache
def door_class(cls: Any) -> type:
    """`cls`, a decoder, with the door; under the same name, by which transformers finds what it may record."""
    return type(cls.__name__, (Door, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
