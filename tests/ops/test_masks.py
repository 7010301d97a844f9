"""The masks, drawn by hand. 1 = may look."""

from __future__ import annotations

import itertools

import pytest
import torch

from htc_vlm.ops import masks
from htc_vlm.tokens import TokenLayout


def seen(row: str, **options: str) -> list[str]:
    """visible() of one sample, a string of 0 and 1 per token."""
    mask = masks.visible(TokenLayout.from_string(row), **options)[0]
    return ["".join(str(int(x)) for x in line) for line in mask.tolist()]


def test_equation_6_for_one_image() -> None:
    """X = [v v; b; t t]: a visual token sees itself, the bottleneck its image, text the bottleneck and text before."""
    assert seen("vvbtt") == [
        "10000",
        "01000",
        "11100",
        "00110",
        "00111",
    ]  # fmt: skip


def test_voco_lets_visual_tokens_see_each_other() -> None:
    """VoCo-LLaMA's released mask is causal inside the image."""
    assert seen("vvbtt", visual_attention="causal") == [
        "10000",
        "11000",
        "11100",
        "00110",
        "00111",
    ]  # fmt: skip


def test_an_image_sees_nothing_outside_itself() -> None:
    """Otherwise a stored image would depend on what stood before it when it was compressed."""
    for attention in masks.VISUAL_ATTENTION:
        mask = masks.visible(TokenLayout.from_string("ttvvbbvbt"), attention)[0]
        assert not mask[2:6, :2].any() and not mask[6:8, :6].any()
        assert mask[8].tolist() == [True, True, False, False, True, True, False, True, True]


def test_several_bottleneck_tokens_see_their_image_and_each_other_causally() -> None:
    assert seen("vvbbb")[2:] == ["11100", "11110", "11111"]


def test_padding_neither_sees_nor_is_seen() -> None:
    mask = masks.visible(TokenLayout.from_string("ppvbt", "vbtpp"))
    assert not mask[0, :2].any() and not mask[0, :, :2].any()
    assert not mask[1, 3:].any() and not mask[1, :, 3:].any()


@pytest.mark.parametrize("attention", masks.VISUAL_ATTENTION)
def test_no_layout_breaks_the_rules(attention: str) -> None:
    """All 1024 strings of 5 letters: never the future, text never a visual token, every real token itself."""
    rows = ["".join(letters) for letters in itertools.product("ptvb", repeat=5)]
    layout = TokenLayout.from_string(*rows)
    mask = masks.visible(layout, attention)
    assert not mask.triu(1).any()
    assert not (mask & layout.is_text[:, :, None] & layout.is_visual[:, None, :]).any()
    assert mask.diagonal(dim1=1, dim2=2).equal(~layout.is_padding)
    other = layout.image[:, :, None] != layout.image[:, None, :]
    assert not (mask & (layout.image > 0)[:, :, None] & other).any()


def test_packed_questions_do_not_see_each_other() -> None:
    """v b | t t | t: the second question must not read the first one's answer."""
    kind = TokenLayout.from_string("vbttt").kind
    layout = TokenLayout.from_kind(kind, question=torch.tensor([[0, 0, 1, 1, 2]]))
    lines = masks.visible(layout)[0].int().tolist()
    assert lines == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 1]]
    lines = masks.packed_causal(layout)[0].int().tolist()
    assert lines[4] == [1, 1, 0, 0, 1] and lines[3] == [1, 1, 1, 1, 0]


def test_an_unknown_visual_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="visual_attention is 'full'; known: self, causal"):
        masks.visible(TokenLayout.from_string("vbt"), "full")
