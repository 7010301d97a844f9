"""Put cached images into prompts: which kv each sample reads, and the position of every token.

Source:  HTC-VLM section 4.2 (text after the bottleneck); ops/rope.py for the two numberings.
Differs: prompts may hold several images anywhere, and several prompts may share one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Placed:
    """A batch ready to run over a cache whose first columns are kv, left-padded like the text.

    image (B, M): which image each slot of a sample reads (0 where is_slot is False).
    is_slot (B, M): False for left padding of samples with fewer images.
    slot_position (B, M): rotary position of the slot's first bottleneck token.
    text_ids, text_mask, text_position (B, T): the tokens that are not cached.
    interleaved: some text comes before an image of its sample, so that plain causal attention would not do.
    alike: every prompt reads one and the same image at one and the same position, so that one copy of its kv will do.
    """

    image: Tensor
    is_slot: Tensor
    slot_position: Tensor
    text_ids: Tensor
    text_mask: Tensor
    text_position: Tensor
    interleaved: bool
    alike: bool


def place(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    n_images: int,
    n_bottleneck: int,
    image_costs: Sequence[int],
    image_token_id: int,
    bottleneck_token_id: int,
    n_entries: int | None = None,
) -> Placed:
    """(B, L) prompts -> where each image and each token goes.

    Placeholders: K bottleneck tokens per image, preceded or not by its visual placeholders (which are dropped: the
    cache stands for them). Images are taken in order of appearance. A batch without any placeholder gets one image per
    prompt, put first; a single image is shared by all prompts. `image_costs` are the numbers of positions before each
    image's first bottleneck token (its C for sequential numbering, 0 for compact). n_entries: of the cached images, where
    they have fewer than the K of the prompt's placeholders.

    >>> placed = place(torch.tensor([[7, 9, 5, 6]]), None, 1, 1, [4], image_token_id=8, bottleneck_token_id=9)
    >>> placed.text_ids.tolist(), placed.text_position.tolist(), placed.slot_position.tolist(), placed.interleaved
    ([[7, 5, 6]], [[0, 6, 7]], [[5]], True)
    """
    mask: Bools | None = None if attention_mask is None else attention_mask.cpu().numpy() != 0
    tokens = _tokens(input_ids.cpu().numpy(), mask, image_token_id, bottleneck_token_id)
    n_wanted = _count_images(tokens, n_bottleneck)
    if n_entries is not None and n_entries < n_bottleneck:
        tokens, n_bottleneck = tokens.with_first_entries(n_bottleneck, n_entries), n_entries
    shared = n_images == 1
    if not n_wanted.any():
        if n_images not in (1, len(n_wanted)):
            raise ValueError(
                f"{len(n_wanted)} prompts without image placeholders and {n_images} images: give one image per prompt, "
                "one image for all, or mark the places with <image>"
            )
        tokens = tokens.with_image_in_front(n_bottleneck, bottleneck_token_id)
        n_wanted = np.ones_like(n_wanted)
    if (n_wanted.max() > 1) if shared else (n_wanted.sum() != n_images):
        raise ValueError(
            f"the prompts have places for {n_wanted.tolist()} images, {n_images} compressed images were given"
        )
    is_text = tokens.is_real & ~tokens.is_bottleneck
    _check_text(tokens, is_text)

    starts = tokens.is_bottleneck & ((tokens.is_bottleneck.cumsum(1) - 1) % n_bottleneck == 0)
    number = np.zeros(starts.shape, np.int64) if shared else (starts.cumsum() - 1).reshape(starts.shape).clip(min=0)
    position = tokens.is_real.cumsum(1) - 1 + (starts * np.asarray(image_costs, np.int64)[number]).cumsum(1)
    slots, texts = _left_padded(starts), _left_padded(is_text)
    parts: list[NDArray[Any]] = [
        slots.of(number), slots.of(position), slots.is_real, texts.of(tokens.ids), texts.of(position), texts.is_real
    ]  # fmt: skip
    image, slot_position, is_slot, text_ids, text_position, text_mask = _to_device(parts, input_ids.device)
    n_slots = slots.is_real.shape[1]
    return Placed(
        image=image,
        is_slot=is_slot.bool(),
        slot_position=slot_position,
        text_ids=text_ids,
        text_mask=text_mask.bool(),
        text_position=text_position,
        interleaved=bool((starts & (is_text.cumsum(1) > 0)).any()),
        alike=bool(shared and n_slots == 1 and slots.is_real.all() and (np.ptp(position[starts]) == 0)),
    )


@dataclass(frozen=True)
class _Tokens:
    """A batch of prompts, each (B, L): ids, which of them count, and which of these are bottleneck tokens."""

    ids: Ints
    is_real: Bools
    is_bottleneck: Bools

    def with_first_entries(self, n_bottleneck: int, n_entries: int) -> _Tokens:
        """The same prompts where only the first bottleneck tokens of each image count."""
        rank = (self.is_bottleneck.cumsum(1) - 1) % n_bottleneck
        surplus = self.is_bottleneck & (rank >= n_entries)
        return _Tokens(self.ids, self.is_real & ~surplus, self.is_bottleneck & ~surplus)

    def with_image_in_front(self, n_bottleneck: int, bottleneck_token_id: int) -> _Tokens:
        """The same prompts with one image each before all text."""
        image = np.ones((len(self.ids), n_bottleneck), dtype=np.int64)
        yes, no = np.ones_like(image, dtype=np.bool_), np.zeros_like(self.is_real)
        return _Tokens(
            np.concatenate((image * bottleneck_token_id, self.ids), 1),
            np.concatenate((yes, self.is_real), 1),
            np.concatenate((yes, no), 1),
        )


def _tokens(ids: Ints, mask: Bools | None, image_token_id: int, bottleneck_token_id: int) -> _Tokens:
    """Padding does not count, whatever its id; nor do visual placeholders."""
    is_real = ids != image_token_id
    if mask is not None:
        is_real &= mask
    return _Tokens(ids, is_real, is_real & (ids == bottleneck_token_id))


def _count_images(tokens: _Tokens, n_bottleneck: int) -> Ints:
    """(B,) images of each prompt."""
    n_tokens = tokens.is_bottleneck.sum(1)
    wrong = n_tokens % n_bottleneck != 0
    if wrong.any():
        raise ValueError(
            f"a prompt has {n_tokens[wrong][0]} bottleneck tokens, each image has {n_bottleneck}; "
            "let the processor expand <image>"
        )
    return n_tokens // n_bottleneck


def _check_text(tokens: _Tokens, is_text: Bools) -> None:
    """Refuse prompts that ask nothing, or nothing after their last image."""
    has_text = is_text.any(1)
    if not has_text.all():
        raise ValueError(f"prompt {has_text.argmin()} has no text; ask something")
    last = tokens.is_real.shape[1] - 1 - tokens.is_real[:, ::-1].argmax(1)
    ends = tokens.is_bottleneck[np.arange(len(last)), last]
    if ends.any():  # what follows would have to come from the image's own output, which is not cached
        raise ValueError(
            f"prompt {ends.argmax()} ends with an image; put the question, or a word of it, after the image"
        )


@dataclass(frozen=True)
class _LeftPadded:
    """How the chosen entries of a (B, L) array move into a (B, longest) one."""

    chosen: Bools  # (B, L)
    is_real: Bools  # (B, longest), as many True a row as in `chosen`, all at the right

    def of(self, values: Ints) -> Ints:
        """(B, L) -> (B, longest), zeros on the left."""
        out = np.zeros(self.is_real.shape, dtype=np.int64)
        out[self.is_real] = values[self.chosen]
        return out


def _left_padded(chosen: Bools) -> _LeftPadded:
    counts = chosen.sum(1)
    longest = int(counts.max())
    return _LeftPadded(chosen, np.arange(longest)[None, :] >= longest - counts[:, None])


def _to_device(parts: list[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """(B, n) arrays -> int64 tensors, in one copy."""
    widths = [part.shape[1] for part in parts]
    together = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.int64)).to(device)
    return list(together.split(widths, dim=1))
