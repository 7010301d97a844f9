"""Padding single samples to a batch; expected tensors are written out by hand."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.data.collate import Collator, Sample
from htc_vlm.data.conversations import IGNORE, Encoded

SHORT = Sample(Encoded("short", [5, 6], [IGNORE, 6]))
LONG = Sample(Encoded("long", [1, 2, 3, 4], [IGNORE, IGNORE, 3, 4]))
PACKED = Sample(Encoded("packed", [7, 8, 9], [IGNORE, 8, 9], question_ids=[0, 1, 2]))


def pictures(n_images: int, value: float, side: int = 2) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.full((n_images, 3, side, side), value)}


@pytest.mark.parametrize(
    ("side", "ids", "mask", "labels"),
    [
        ("right", [5, 6, 0, 0], [1, 1, 0, 0], [IGNORE, 6, IGNORE, IGNORE]),
        ("left", [0, 0, 5, 6], [0, 0, 1, 1], [IGNORE, IGNORE, IGNORE, 6]),
    ],
)
def test_the_shorter_sample_is_padded(side: str, ids: list[int], mask: list[int], labels: list[int]) -> None:
    """VoCo-LLaMA's tokenizer pads left and its collator right (train_compress.py:759, :900)."""
    batch = Collator(pad_token_id=0, padding_side=side)([SHORT, LONG])
    assert batch["input_ids"].tolist() == [ids, [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [mask, [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [labels, [IGNORE, IGNORE, 3, 4]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_padding_token_that_ends_answers_keeps_its_label() -> None:
    """Many tokenizers pad with the end token; masking labels by id then unlearns to stop."""
    ends = Sample(Encoded("ends", [5, 2], [IGNORE, 2]))
    batch = Collator(pad_token_id=2)([ends, LONG])
    assert batch["labels"][0].tolist() == [IGNORE, 2, IGNORE, IGNORE]
    assert batch["attention_mask"][0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("multiple_of", "length"), [(1, 4), (3, 6), (4, 4), (8, 8)])
def test_the_length_is_rounded_up_to_a_multiple(multiple_of: int, length: int) -> None:
    batch = Collator(pad_token_id=0, multiple_of=multiple_of)([SHORT, LONG])
    assert {tensor.shape for tensor in batch.values()} == {(2, length)}


@pytest.mark.parametrize(("side", "packed"), [("right", [0, 1, 2, 0]), ("left", [0, 0, 1, 2])])
def test_question_ids_are_kept_and_0_for_samples_without(side: str, packed: list[int]) -> None:
    """0 means "seen by all": a sample without packed questions is plain causal beside one with them."""
    batch = Collator(pad_token_id=0, padding_side=side)([PACKED, LONG])
    assert batch["question_ids"].tolist() == [packed, [0, 0, 0, 0]]


def test_no_positions_are_given() -> None:
    """The model numbers positions by its compressor's setting; given ones would override `compact`."""
    assert "position_ids" not in Collator(pad_token_id=0)([PACKED])


def test_pictures_are_joined_in_the_order_of_the_samples() -> None:
    """0, 1 and 2 images: a picture at the wrong place answers another sample's question."""
    batch = Collator(pad_token_id=0)(
        [Sample(SHORT.encoded, pictures(2, 1.0)), LONG, Sample(PACKED.encoded, pictures(1, 3.0))]
    )
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 1.0, 3.0]


def test_any_image_input_is_joined_not_only_pixels() -> None:
    """Features computed before training take the place of pixels."""
    features = {"patch_features": torch.zeros(1, 4, 8), "image_codes": torch.zeros(1, 2, 2, 3)}
    batch = Collator(pad_token_id=0)([Sample(SHORT.encoded, features), Sample(LONG.encoded, features)])
    assert batch["patch_features"].shape == (2, 4, 8)
    assert batch["image_codes"].shape == (2, 2, 2, 3)


@pytest.mark.parametrize("other", [pictures(1, 0.0, side=3), {"patch_features": torch.zeros(1, 4, 8)}])
def test_pictures_that_do_not_fit_together_are_refused_by_name(other: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="'short' and 'long' give different image inputs: pixel_values .3, 2, 2."):
        Collator(pad_token_id=0)([Sample(SHORT.encoded, pictures(1, 0.0)), Sample(LONG.encoded, other)])


def test_samples_without_supervised_tokens_are_refused_by_name() -> None:
    """LLaVA prints "tokenization mismatch ... (ignored)" and trains on nothing, with loss 0."""
    nothing = Sample(Encoded("nothing", [1, 2], [IGNORE, IGNORE]))
    empty = Sample(Encoded("void", [], []))
    with pytest.raises(ValueError, match="no supervised tokens in samples 'nothing', 'void'"):
        Collator(pad_token_id=0)([SHORT, nothing, empty])


def test_samples_that_are_too_long_are_refused_by_name_not_cut() -> None:
    """LLaVA cuts at the tokenizer's limit, after 576 image tokens were added: the answer is gone."""
    with pytest.raises(ValueError, match=r"longer than max_tokens=3: 'long' \(4\)"):
        Collator(pad_token_id=0, max_tokens=3)([SHORT, LONG])


def test_no_samples_and_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="is the data set empty"):
        Collator(pad_token_id=0)([])
    with pytest.raises(ValueError, match="padding_side is 'both'"):
        Collator(pad_token_id=0, padding_side="both")
    with pytest.raises(ValueError, match="multiple_of is 0"):
        Collator(pad_token_id=0, multiple_of=0)


def test_ids_and_labels_of_different_lengths_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'bad': ids, labels, question_ids differ in length"):
        Collator(pad_token_id=0)([Sample(Encoded("bad", [1, 2, 3], [1]))])
