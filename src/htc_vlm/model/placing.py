"""Put cached images into prompts: which cells each sample reads, and the position of every token.

Source:  HTC-VLM section 4.2 (text after the bottleneck); ops/rope.py for the two numberings.
Differs: prompts may hold several images anywhere, and several prompts may share one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placed:
    """A batch ready to run over a cache whose first columns are cells, left-padded like the text.

    image (B, M): which image each slot of a sample reads (0 where is_slot is False).
    is_slot (B, M): False for left padding of samples with fewer images.
    slot_position (B, M): rotary position of the slot's first bottleneck token.
    text_ids, text_mask, text_position (B, T): the tokens that are not cached.
    interleaved: some text comes before an image of its sample, so that plain causal attention would not do.
    """

    image: Tensor
    is_slot: Tensor
    slot_position: Tensor
    text_ids: Tensor
    text_mask: Tensor
    text_position: Tensor
    interleaved: bool


def place(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    n_images: int,
    n_bottleneck: int,
    image_cost: int,
    image_token_id: int,
    bottleneck_token_id: int,
) -> Placed:
    """(B, L) prompts -> where each image and each token goes.

    Placeholders: K bottleneck tokens per image, preceded or not by its visual placeholders (which are dropped: the
    cache stands for them). Images are taken in order of appearance. A batch without any placeholder gets one image per
    prompt, put first; a single image is shared by all prompts. `image_cost` is the number of positions before an
    image's first bottleneck token (C for sequential numbering, 0 for compact).

    >>> placed = place(torch.tensor([[7, 9, 5, 6]]), None, 1, 1, 4, image_token_id=8, bottleneck_token_id=9)
    >>> placed.text_ids.tolist(), placed.text_position.tolist(), placed.slot_position.tolist(), placed.interleaved
    ([[7, 5, 6]], [[0, 6, 7]], [[5]], True)
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids.cpu(), attention_mask.cpu(), strict=True)]
    rows = [[token for token in row if token != image_token_id] for row in rows]
    n_wanted = [_count_images(row, bottleneck_token_id, n_bottleneck) for row in rows]
    shared = n_images == 1
    if not any(n_wanted):
        if n_images not in (1, len(rows)):
            raise ValueError(
                f"{len(rows)} prompts without image placeholders and {n_images} images: give one image per prompt, "
                "one image for all, or mark the places with <image>"
            )
        rows = [[bottleneck_token_id] * n_bottleneck + row for row in rows]
        n_wanted = [1] * len(rows)
    if shared and max(n_wanted) > 1 or not shared and sum(n_wanted) != n_images:
        raise ValueError(f"the prompts have places for {n_wanted} images, {n_images} compressed images were given")

    slots: list[list[tuple[int, int]]] = []
    texts: list[list[tuple[int, int]]] = []
    n_used, interleaved = 0, False
    for row in rows:
        sample_slots, sample_text, sample_interleaved = _walk(row, bottleneck_token_id, n_bottleneck, image_cost)
        first = 0 if shared else n_used
        slots.append([(first + i, position) for i, position in enumerate(sample_slots)])
        texts.append(sample_text)
        n_used += len(sample_slots)
        interleaved |= sample_interleaved
    if not all(texts):
        raise ValueError(f"prompt {[bool(text) for text in texts].index(False)} has no text; ask something")
    ends = [row[-1] == bottleneck_token_id for row in rows]
    if any(ends):  # what follows would have to come from the image's own output, which is not cached
        raise ValueError(f"prompt {ends.index(True)} ends with an image; put the question, or a word of it, after the image")
    image, slot_position, is_slot = _left_padded(slots)
    text_ids, text_position, text_mask = _left_padded(texts)
    device = input_ids.device
    return Placed(
        image=image.to(device),
        is_slot=is_slot.to(device),
        slot_position=slot_position.to(device),
        text_ids=text_ids.to(device),
        text_mask=text_mask.to(device),
        text_position=text_position.to(device),
        interleaved=interleaved,
    )


def _count_images(row: list[int], bottleneck_token_id: int, n_bottleneck: int) -> int:
    n_tokens = row.count(bottleneck_token_id)
    if n_tokens % n_bottleneck:
        raise ValueError(
            f"a prompt has {n_tokens} bottleneck tokens, each image has {n_bottleneck}; "
            "let the processor expand <image>"
        )
    return n_tokens // n_bottleneck


def _walk(
    row: list[int], bottleneck_token_id: int, n_bottleneck: int, image_cost: int
) -> tuple[list[int], list[tuple[int, int]], bool]:
    """One prompt -> positions of its images, (id, position) of its text, and whether text precedes an image."""
    images: list[int] = []
    text: list[tuple[int, int]] = []
    position, n_left, interleaved = 0, 0, False
    for token in row:
        if token == bottleneck_token_id:
            if n_left == 0:
                position += image_cost
                images.append(position)
                interleaved |= bool(text)
                n_left = n_bottleneck
            n_left -= 1
        else:
            text.append((token, position))
        position += 1
    return images, text, interleaved


def _left_padded(rows: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of pairs -> two (B, longest) tensors, zeros on the left, and the mask of what is real."""
    longest = max(len(row) for row in rows)
    first = torch.zeros(len(rows), longest, dtype=torch.long)
    second = torch.zeros_like(first)
    real = torch.zeros_like(first, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            pairs = torch.tensor(row, dtype=torch.long)
            first[i, -len(row) :], second[i, -len(row) :], real[i, -len(row) :] = pairs[:, 0], pairs[:, 1], True
    return first, second, real
