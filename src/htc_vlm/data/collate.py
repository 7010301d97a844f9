"""From single samples to a padded batch.

Source:  ours.
Differs: nothing known. Nothing is ever cut off: LLaVA cuts sequences at the tokenizer's limit and loses answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from htc_vlm.data.conversations import IGNORE, Encoded


@dataclass(frozen=True)
class Sample:
    """What a data set gives the collator.

    images: the model's inputs for this sample's pictures by name, first dimension = number of images, e.g.
    {"pixel_values": (n, 3, height, width)} or {"patch_features": (n, P, width)}; {} for text only.
    """

    encoded: Encoded
    images: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Collator:
    """Samples -> the model's arguments: input_ids, attention_mask, labels, question_ids (if any is packed), images.

    Pads to the longest, rounded up to `multiple_of`. Refuses, naming ids: a sample without supervised tokens, and one
    longer than `max_tokens`. Positions are left to the model, which numbers them by its compressor's setting.
    """

    pad_token_id: int
    padding_side: str = "right"
    multiple_of: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}; known: left, right")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}; give at least 1")

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """B samples -> (B, L) tensors and, for all their N images together, (N, ...) tensors."""
        encoded = [sample.encoded for sample in samples]
        self._check(encoded)
        longest = max(len(one.input_ids) for one in encoded)
        length = -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": self._pad([one.input_ids for one in encoded], self.pad_token_id, length),
            "attention_mask": self._pad([[1] * len(one.input_ids) for one in encoded], 0, length),
            "labels": self._pad([one.labels for one in encoded], IGNORE, length),
        }
        if any(one.question_ids is not None for one in encoded):
            rows = [[0] * len(one.input_ids) if one.question_ids is None else one.question_ids for one in encoded]
            batch["question_ids"] = self._pad(rows, 0, length)
        return batch | join_images(samples)

    def _check(self, encoded: Sequence[Encoded]) -> None:
        if not encoded:
            raise ValueError("no samples to collate; is the data set empty?")
        for one in encoded:
            lengths = {len(one.input_ids), len(one.labels), len(one.question_ids or one.input_ids)}
            if len(lengths) != 1:
                raise ValueError(f"sample {one.id!r}: ids, labels, question_ids differ in length: {sorted(lengths)}")
        empty = [one.id for one in encoded if one.n_supervised == 0]
        if empty:
            raise ValueError(
                f"no supervised tokens in samples {', '.join(map(repr, empty))}: all their labels are {IGNORE}; "
                "give them answers or remove them"
            )
        if self.max_tokens is not None:
            long = [f"{one.id!r} ({len(one.input_ids)})" for one in encoded if len(one.input_ids) > self.max_tokens]
            if long:
                raise ValueError(
                    f"samples longer than max_tokens={self.max_tokens}: {', '.join(long)}; split them or raise it"
                )

    def _pad(self, rows: Sequence[list[int]], value: int, length: int) -> Tensor:
        """(B, length)"""
        if self.padding_side == "left":
            return torch.tensor([[value] * (length - len(row)) + row for row in rows])
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def join_images(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The pictures of all samples one after the other, (N, ...) per name; {} where no sample has any.

    ValueError, naming the ids, where samples with pictures do not all give the same inputs in the same shape.
    """
    with_images = [sample for sample in samples if sample.images]
    if not with_images:
        return {}
    with_images = _with_equal_tiles(with_images)
    first = with_images[0]
    shapes = {name: tensor.shape[1:] for name, tensor in first.images.items()}
    for sample in with_images:
        found = {name: tensor.shape[1:] for name, tensor in sample.images.items()}
        if found != shapes:
            raise ValueError(
                f"samples {first.encoded.id!r} and {sample.encoded.id!r} give different image inputs: "
                f"{_listing(shapes)} and {_listing(found)}; prepare all pictures with one image processor"
            )
    return {name: torch.cat([sample.images[name] for sample in with_images]) for name in shapes}


def _with_equal_tiles(samples: list[Sample]) -> list[Sample]:
    """Pictures in tiles (n, tiles, 3, height, width), and masks of their pixels, get empty tiles up to the most there are."""
    tiled = ("pixel_values", "pixel_attention_mask")
    if any(sample.images.get("pixel_values", torch.empty(0)).ndim != 5 for sample in samples):
        return samples
    most = max(sample.images["pixel_values"].shape[1] for sample in samples)

    def padded(name: str, tensor: Tensor) -> Tensor:
        if name not in tiled:
            return tensor
        return torch.cat((tensor, tensor.new_zeros(len(tensor), most - tensor.shape[1], *tensor.shape[2:])), dim=1)

    return [
        Sample(sample.encoded, {name: padded(name, tensor) for name, tensor in sample.images.items()}) for sample in samples
    ]


def _listing(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
