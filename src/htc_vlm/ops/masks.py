"""Who may look at whom: the disentanglement mask of HTC-VLM and the mask of VoCo-LLaMA, as booleans.

Source:  HTC-VLM Eq. 6; VoCo-LLaMA's released mask (commit 3b6e14d) for `visual_attention="causal"`.
Differs: Eq. 6 mixes conventions (0, -inf and 1 in one additive mask; "otherwise 1" would let a token see its future).
         We read it as a boolean, ANDed with causal: text never sees visual tokens; a visual token sees itself only
         (`self`) or its image so far (`causal`); the bottleneck sees its image. Images attend only to themselves,
         so nothing before an image reaches it (the paper's X has nothing there; VoCo's has BOS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from htc_vlm.tokens import TokenLayout

VISUAL_ATTENTION = ("self", "causal")


def visible(layout: TokenLayout, visual_attention: str = "self") -> Tensor:
    """(B, L, L) bool; [b, i, j] is True where token i may look at token j. Rows and columns of padding are all False.

    >>> print(draw(visible(TokenLayout.from_string("vvvbtt"))[0], "vvvbtt"))
    v ■ · · · · ·
    v · ■ · · · ·
    v · · ■ · · ·
    b ■ ■ ■ ■ · ·
    t · · · ■ ■ ·
    t · · · ■ ■ ■
    >>> print(draw(visible(TokenLayout.from_string("vvvbtt"), visual_attention="causal")[0], "vvvbtt"))
    v ■ · · · · ·
    v ■ ■ · · · ·
    v ■ ■ ■ · · ·
    b ■ ■ ■ ■ · ·
    t · · · ■ ■ ·
    t · · · ■ ■ ■

    Two images with text around them; left padding:

    >>> print(draw(visible(TokenLayout.from_string("ptvbtvbt"))[0], "ptvbtvbt"))
    p · · · · · · · ·
    t · ■ · · · · · ·
    v · · ■ · · · · ·
    b · · ■ ■ · · · ·
    t · ■ · ■ ■ · · ·
    v · · · · · ■ · ·
    b · · · · · ■ ■ ·
    t · ■ · ■ ■ · ■ ■
    """
    if visual_attention not in VISUAL_ATTENTION:
        raise ValueError(f"visual_attention is {visual_attention!r}; known: {', '.join(VISUAL_ATTENTION)}")
    image = layout.image
    same_image = image[:, :, None] == image[:, None, :]
    is_text, is_visual = layout.is_text, layout.is_visual
    in_image = image > 0

    allowed = is_text[:, :, None] & ~is_visual[:, None, :]
    allowed |= layout.is_bottleneck[:, :, None] & same_image
    if visual_attention == "causal":
        allowed |= is_visual[:, :, None] & same_image
    else:
        length = image.shape[1]
        allowed |= is_visual[:, :, None] & torch.eye(length, dtype=torch.bool, device=image.device)
    allowed &= ~in_image[:, :, None] | same_image
    return allowed & causal(layout) & same_question(layout)


def causal(layout: TokenLayout) -> Tensor:
    """(B, L, L): j <= i and neither is padding."""
    length = layout.kind.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=layout.kind.device).tril()
    real = ~layout.is_padding
    return past & real[:, None, :] & real[:, :, None]


def same_question(layout: TokenLayout) -> Tensor:
    """(B, L, L): packed questions see what is shared (0) and themselves, never each other.

    >>> layout = TokenLayout.from_kind(torch.tensor([[1, 1, 1]]), question=torch.tensor([[0, 1, 2]]))
    >>> same_question(layout)[0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    question = layout.question
    return (question[:, None, :] == 0) | (question[:, :, None] == question[:, None, :])


def packed_causal(layout: TokenLayout) -> Tensor:
    """(B, L, L): plain causal attention with packed questions kept apart; what the uncompressed model trains with."""
    return causal(layout) & same_question(layout)


def draw(mask: Tensor, letters: str) -> str:
    """(L, L) bool -> a picture: each row is a token and shows whom it looks at; `letters` as for TokenLayout."""
    rows = ["".join(" ■" if seen else " ·" for seen in row) for row in mask.tolist()]
    return "\n".join(letter + row for letter, row in zip(letters, rows, strict=True))
