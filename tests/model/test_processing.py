"""The processor: placeholders that fit the model, with pictures and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from htc_vlm.model import HtcVlmProcessor

from .. import tinies
from ..tinies import BOTTLENECK, IMAGE, N_PATCHES, TINY_CODE, pictures


def processor(compressor: dict[str, Any]) -> HtcVlmProcessor:
    tokenizer = tinies.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<voco>"]}, replace_extra_special_tokens=False)
    return HtcVlmProcessor.for_config(
        tinies.config(compressor), tinies.image_processor(), tokenizer, num_additional_image_tokens=1
    )


CASES: list[tuple[dict[str, Any], int, int]] = [  # C and K, by hand
    ({"name": "none"}, N_PATCHES, 0),
    ({"name": "avg_pool", "n_tokens": 4}, 4, 0),
    ({"name": "voco", "n_bottleneck": 3}, N_PATCHES, 3),
    ({"name": "htc", "quantizer": TINY_CODE}, 4 + N_PATCHES, 1),
    ({"name": "htc", "quantizer": TINY_CODE, "channels": "discrete"}, 8 * 8, 1),  # 32 pixels, 4 per cell
    ({"name": "htc", "quantizer": TINY_CODE, "fusion": "mean"}, N_PATCHES, 1),
]


@pytest.mark.parametrize(("compressor", "n_visual", "n_bottleneck"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_an_image_becomes_c_visual_and_k_bottleneck_tokens(
    compressor: dict[str, Any], n_visual: int, n_bottleneck: int
) -> None:
    """One placeholder too many or too few fails at the first step, or puts the mask one token off."""
    out = processor(compressor)(text="what is <image> it ?", images=pictures(1), return_tensors="pt")
    ids = out["input_ids"][0].tolist()
    begin = ids.index(IMAGE)
    assert ids[begin : begin + n_visual + n_bottleneck] == [IMAGE] * n_visual + [BOTTLENECK] * n_bottleneck
    assert ids.count(IMAGE) == n_visual and ids.count(BOTTLENECK) == n_bottleneck
    assert out["pixel_values"].shape == (1, 3, 32, 32)


def test_without_pictures_an_image_is_its_bottleneck_tokens() -> None:
    """A prompt answered from the cache has no use for 576 placeholders."""
    made = processor({"name": "voco", "n_bottleneck": 2})
    out = made(text="what is <image> it ?", return_tensors="pt")
    assert out["input_ids"][0].tolist().count(BOTTLENECK) == 2 and IMAGE not in out["input_ids"][0].tolist()
    assert "pixel_values" not in out


def test_an_image_without_picture_or_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="no images were given, and this model keeps no compressed images"):
        processor({"name": "none"})(text="what is <image> it ?", return_tensors="pt")


def test_pictures_and_placeholders_must_be_as_many() -> None:
    """One picture too many would answer for the next prompt."""
    with pytest.raises((ValueError, IndexError, StopIteration)):
        processor({"name": "voco"})(text=["<image> what ?", "where ?"], images=pictures(3), return_tensors="pt")


def test_a_tokenizer_that_splits_the_bottleneck_token_is_refused() -> None:
    """`<voco>` in pieces would be text, and the image without a bottleneck."""
    with pytest.raises(ValueError, match="splits '<voco>'; add it as a special token"):
        HtcVlmProcessor.for_config(
            tinies.config({"name": "voco"}), tinies.image_processor(), tinies.tokenizer(),
            num_additional_image_tokens=1,
        )  # fmt: skip


def test_a_tokenizer_of_another_checkpoint_is_refused() -> None:
    config = tinies.config({"name": "none"})
    config.image_token_index = 12
    with pytest.raises(ValueError, match="<image> is not config.image_token_id"):
        HtcVlmProcessor.for_config(config, tinies.image_processor(), tinies.tokenizer())


def test_counts_survive_saving(tmp_path: Path) -> None:
    made = processor({"name": "htc", "quantizer": TINY_CODE})
    made.save_pretrained(tmp_path)
    again = HtcVlmProcessor.from_pretrained(tmp_path)
    assert (again.n_visual, again.n_bottleneck, again.bottleneck_token) == (20, 1, "<voco>")
    inputs: dict[str, Any] = {"text": "<image> what is it ?", "images": pictures(1), "return_tensors": "pt"}
    before, after = made(**inputs), again(**inputs)
    assert all(after[key].equal(before[key]) for key in before)


@torch.no_grad()
def test_prompts_are_padded_on_the_left() -> None:
    """Right padding puts the answer after padding; word order is lost."""
    out = processor({"name": "voco"})(text=["what", "what is it ?"], padding=True, return_tensors="pt")
    assert out["attention_mask"].tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
