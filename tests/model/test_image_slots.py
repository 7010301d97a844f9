"""Cached images in prompts: which kv each sample reads, and where everything stands. Positions counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from htc_vlm.model.image_slots import Placed, place

V, B = 8, 9  # ids of <image> and <voco>


def placed(rows: list[list[int]], n_images: int, n_bottleneck: int = 1, image_cost: int = 4) -> Placed:
    """`place` on left-padded rows; an image costs 4 positions before its bottleneck."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return place(ids, mask, n_images, n_bottleneck, [image_cost] * n_images, image_token_id=V, bottleneck_token_id=B)


def test_an_image_in_front_is_a_plain_prefix() -> None:
    """v v v v b t t: the bottleneck stands at 4, the text at 5 and 6, and causal attention will do."""
    out = placed([[V, V, V, V, B, 5, 6]], 1)
    assert out.slot_position.tolist() == [[4]] and out.text_position.tolist() == [[5, 6]]
    assert out.text_ids.tolist() == [[5, 6]] and not out.interleaved


def test_compact_numbering_costs_one_position_per_bottleneck_token() -> None:
    """t b t b t: positions 0 to 4, whatever the images held."""
    out = placed([[5, B, 6, B, 7]], 2, image_cost=0)
    assert out.slot_position.tolist() == [[1, 3]] and out.text_position.tolist() == [[0, 2, 4]]
    assert out.interleaved


def test_several_bottleneck_tokens_are_one_image() -> None:
    """b b b b t with K = 2 are two images: at 4 (and 5) and at 10 (and 11); the text at 12."""
    out = placed([[B, B, B, B, 5]], 2, n_bottleneck=2)
    assert out.image.tolist() == [[0, 1]]
    assert out.slot_position.tolist() == [[4, 10]] and out.text_position.tolist() == [[12]]


def test_samples_with_fewer_images_are_padded_on_the_left() -> None:
    """Images are taken in order of appearance over the batch."""
    out = placed([[B, 5, B, 6], [7, 7], [B, 5]], 3)
    assert out.image.tolist() == [[0, 1], [0, 0], [0, 2]]
    assert out.is_slot.tolist() == [[True, True], [False, False], [False, True]]
    assert out.text_mask.tolist() == [[True, True], [True, True], [False, True]]
    assert out.text_position.tolist() == [[5, 11], [0, 1], [0, 5]]


def test_text_is_left_padded_with_its_own_positions() -> None:
    out = placed([[B, 5, 6, 7], [B, 5]], 2)
    assert out.text_ids.tolist() == [[5, 6, 7], [0, 0, 5]]
    assert out.text_mask.tolist() == [[True, True, True], [False, False, True]]
    assert out.text_position.tolist() == [[5, 6, 7], [0, 0, 5]]


def test_one_image_is_shared_by_all_prompts() -> None:
    """With and without placeholders."""
    for rows in ([[B, 5], [B, 6]], [[5], [6]]):
        out = placed(rows, 1)
        assert out.image.tolist() == [[0], [0]] and out.slot_position.tolist() == [[4], [4]]


def test_prompts_without_placeholders_get_one_image_each() -> None:
    out = placed([[5], [6]], 2)
    assert out.image.tolist() == [[0], [1]] and out.text_position.tolist() == [[5], [5]]


def test_padding_tokens_that_look_like_placeholders_are_ignored() -> None:
    """Some tokenizers pad with a token of the prompt; the mask decides."""
    ids, mask = torch.tensor([[B, B, B, 5]]), torch.tensor([[0, 0, 1, 1]])
    out = place(ids, mask, 1, 1, [4], image_token_id=V, bottleneck_token_id=B)
    assert out.image.tolist() == [[0]] and out.text_ids.tolist() == [[5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [[B, 5], [B, 6]], "n_images": 3}, r"places for \[1, 1\] images, 3 compressed images were given"),
        ({"rows": [[B, 5, B, 6]], "n_images": 1}, r"places for \[2\] images, 1 compressed"),
        ({"rows": [[5], [6]], "n_images": 3}, "2 prompts without image placeholders and 3 images"),
        ({"rows": [[B, B, B, 5]], "n_images": 1, "n_bottleneck": 2}, "has 3 bottleneck tokens, each image has 2"),
        ({"rows": [[5, B, 6], [B]], "n_images": 2}, "prompt 1 has no text"),
        ({"rows": [[B, 5], [5, B]], "n_images": 2}, "prompt 1 ends with an image"),
    ],
)
def test_what_does_not_add_up_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Answers about the wrong picture."""
    with pytest.raises(ValueError, match=message):
        placed(**arguments)


def test_prompts_that_read_one_image_at_one_place_are_known_to_be_alike() -> None:
    """One copy of the kv will do for them, and for no others."""
    assert placed([[B, 5], [B, 6, 7]], 1).alike and placed([[5], [6]], 1).alike and placed([[5, B, 6], [7, B, 4]], 1).alike
    assert not placed([[B, 5], [4, B, 6]], 1).alike  # another place
    assert not placed([[B, 5], [6]], 1).alike  # a prompt without an image
    assert not placed([[B, 5], [B, 6]], 2).alike  # other images
