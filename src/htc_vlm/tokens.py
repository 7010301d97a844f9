"""Who sits where in a sequence, and what a schedule of visual tokens amounts to.

Shape letters, used in every docstring of this library:

    B  batch                 P  patches of one image       C  visual tokens of one image that the LLM receives
    K  bottleneck tokens     T  text tokens                L  whole sequence
    D  width of the LLM      H  heads                      N  any run of tokens

Source:  HTC-VLM section 4.2, X = [V_hy; voco; W]. What the paper calls `<voco>`, z or "compressed token" is the
         *bottleneck* here.
Differs: a sequence may hold any number of images at any place, and many packed questions about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING, TEXT, VISUAL, BOTTLENECK = 0, 1, 2, 3
_LETTERS = {"p": PADDING, "t": TEXT, "v": VISUAL, "b": BOTTLENECK}


@dataclass(frozen=True)
class TokenLayout:
    """What each token of a batch is.

    kind (B, L): PADDING, TEXT, VISUAL (anchors and patches) or BOTTLENECK.
    image (B, L): 1, 2, ... for the tokens of the first, second, ... image of the sample; 0 elsewhere.
    question (B, L): 1, 2, ... for packed questions, which do not see each other; 0 for what all of them share.
    """

    kind: Tensor
    image: Tensor
    question: Tensor

    @property
    def is_padding(self) -> Tensor:
        return self.kind == PADDING

    @property
    def is_text(self) -> Tensor:
        return self.kind == TEXT

    @property
    def is_visual(self) -> Tensor:
        return self.kind == VISUAL

    @property
    def is_bottleneck(self) -> Tensor:
        return self.kind == BOTTLENECK

    @classmethod
    def from_string(cls, *rows: str) -> TokenLayout:
        """One string per sample: v visual, b bottleneck, t text, p padding; a run of v's and its b's is one image.

        >>> TokenLayout.from_string("vvbvbt").image
        tensor([[1, 1, 1, 2, 2, 0]])
        >>> TokenLayout.from_string("vvx")
        Traceback (most recent call last):
        ValueError: unknown letter 'x' in layout 'vvx'; use v visual, b bottleneck, t text, p padding
        """
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"layouts must have one common length, got {[len(row) for row in rows]}; pad with 'p'")
        for row in rows:
            unknown = set(row) - set(_LETTERS)
            if unknown:
                raise ValueError(
                    f"unknown letter {min(unknown)!r} in layout {row!r}; use v visual, b bottleneck, t text, p padding"
                )
        return cls.from_kind(torch.tensor([[_LETTERS[letter] for letter in row] for row in rows]))

    @classmethod
    def from_kind(cls, kind: Tensor, question: Tensor | None = None) -> TokenLayout:
        """(B, L) kinds -> layout; an image begins at each visual token whose left neighbour is not visual.

        An image without visual tokens (its placeholder in a prompt answered from the cache) begins at its first
        bottleneck token.
        """
        before = torch.nn.functional.pad(kind, (1, 0), value=PADDING)[:, :-1]
        starts = (kind == VISUAL) & (before != VISUAL)
        starts |= (kind == BOTTLENECK) & (before != VISUAL) & (before != BOTTLENECK)
        is_image = (kind == VISUAL) | (kind == BOTTLENECK)
        image = starts.long().cumsum(dim=1) * is_image
        return cls(kind=kind, image=image, question=torch.zeros_like(kind) if question is None else question)

    @classmethod
    def from_input_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_token_id: int,
        bottleneck_token_id: int | None,
        question: Tensor | None = None,
    ) -> TokenLayout:
        """(B, L) ids -> layout; tokens where `attention_mask` is 0 are padding whatever their id."""
        kind = torch.full_like(input_ids, TEXT)
        kind[input_ids == image_token_id] = VISUAL
        if bottleneck_token_id is not None:
            kind[input_ids == bottleneck_token_id] = BOTTLENECK
        if attention_mask is not None:
            kind[attention_mask == 0] = PADDING
        return cls.from_kind(kind, question)

    def to_strings(self) -> list[str]:
        """The inverse of `from_string`.

        >>> TokenLayout.from_string("pvvbt").to_strings()
        ['pvvbt']
        """
        letters = {value: letter for letter, value in _LETTERS.items()}
        return ["".join(letters[value] for value in row) for row in self.kind.tolist()]


def equivalent_tokens(schedule: Sequence[int]) -> float:
    """Mean over layers of the visual tokens that enter each layer; the one token count that compares all methods.

    FastV with K = 2 and 166 kept tokens of 576 in 32 layers is "192 tokens" (specs: average over layers):

    >>> round(equivalent_tokens([576] * 2 + [166] * 30), 1)
    191.6
    """
    if not schedule:
        raise ValueError("an empty schedule has no mean; give one number of visual tokens per layer")
    return sum(schedule) / len(schedule)
