"""TokenLayout: who is what in a batch, written as strings."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.tokens import TokenLayout, equivalent_tokens


def test_every_run_of_visual_tokens_and_its_bottleneck_is_one_image() -> None:
    """Two images side by side must not become one: the second bottleneck would hold both."""
    layout = TokenLayout.from_string("tvvbvvbtp", "pptvvvbbt")
    assert layout.image.tolist() == [[0, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 0]]


def test_an_image_without_visual_tokens_begins_at_its_bottleneck() -> None:
    """Prompts answered from the cache hold bottleneck tokens alone."""
    assert TokenLayout.from_string("tbtb").image.tolist() == [[0, 1, 0, 2]]


def test_text_between_images_belongs_to_none() -> None:
    assert TokenLayout.from_string("vbtvb").image.tolist() == [[1, 1, 0, 2, 2]]


def test_padding_is_padding_whatever_its_id() -> None:
    """LLaVA pads with ids that are also text; only the attention mask knows."""
    ids = torch.tensor([[8, 8, 9, 5], [8, 9, 5, 5]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    layout = TokenLayout.from_input_ids(ids, mask, image_token_id=8, bottleneck_token_id=9)
    assert layout.to_strings() == ["pvbt", "vbtp"]


def test_without_a_bottleneck_method_its_id_is_a_word() -> None:
    """`<voco>` in the vocabulary of an uncompressed model is text like any other."""
    layout = TokenLayout.from_input_ids(torch.tensor([[8, 9]]), None, image_token_id=8, bottleneck_token_id=None)
    assert layout.to_strings() == ["vt"]


@pytest.mark.parametrize("row", ["", "t", "ptvvbt", "vvvbb", "vbvbtt"])
def test_strings_come_back_as_they_were(row: str) -> None:
    if row:
        assert TokenLayout.from_string(row).to_strings() == [row]


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one common length, got \[2, 3\]; pad with 'p'"):
        TokenLayout.from_string("vt", "vbt")


def test_equivalent_tokens_are_the_mean_over_layers() -> None:
    """PyramidDrop's paper setting: 576 for 8 layers, then halved thrice: (576 + 288 + 144 + 72) / 4 = 270."""
    assert equivalent_tokens([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8) == 270
    with pytest.raises(ValueError, match="empty schedule"):
        equivalent_tokens([])
