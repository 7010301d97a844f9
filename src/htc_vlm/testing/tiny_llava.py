"""A tiny random LLaVA, with and without a compressor, and prompts about noise: what the contract runs a method on.

One image is 32 x 32 pixels in patches of 8: P = 16. The language model has 3 layers and grouped key-value heads. A method
that is not registered is, for as long as its model is made.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration

N_PATCHES, N_LAYERS = 16, 3
PAD, IMAGE, BOTTLENECK = 0, 38, 39
N_VOCABULARY = 40  # 0 pad, 1 end, 2 unknown, 3 begin, 4 to 37 words, 38 <image>, 39 <voco>
TOLERANCE = 1e-4  # of logits about 10 in size, in float32


def vision_config(n_blocks: int = 2) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=n_blocks, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip


def text_config(n_vocabulary: int = N_VOCABULARY) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=n_vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=N_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        pad_token_id=PAD, bos_token_id=3, eos_token_id=None,
    )  # fmt: skip


def config(compressor: dict[str, Any] | None = None, attention: str = "sdpa") -> HtcVlmConfig:
    made = HtcVlmConfig(
        vision_config=vision_config(), text_config=text_config(), image_token_index=IMAGE,
        bottleneck_token_id=BOTTLENECK, compressor=compressor or {"name": "none"}, image_seq_length=N_PATCHES,
        tie_word_embeddings=False,
    )  # fmt: skip
    made._attn_implementation = attention
    return made


def build(compressor: dict[str, Any] | None = None, attention: str = "sdpa") -> HtcVlmForConditionalGeneration:
    """A new model with random weights, always the same ones for the same compressor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HtcVlmForConditionalGeneration(config(compressor, attention)).eval()
    model.generation_config.suppress_tokens = [IMAGE, BOTTLENECK]
    return model


def shared(compressor: dict[str, Any], attention: str = "sdpa") -> HtcVlmForConditionalGeneration:
    """`build`, made once per test process; do not change what it returns."""
    return _shared(json.dumps(compressor, sort_keys=True), attention)


@functools.cache
def _shared(compressor: str, attention: str) -> HtcVlmForConditionalGeneration:
    return build(json.loads(compressor), attention)


@functools.cache
def host(attention: str = "sdpa") -> HtcVlmForConditionalGeneration:
    """An uncompressed model to apply methods to: four blocks in its tower, room for methods inside; do not change it."""
    made = config(None, attention)
    made.vision_config = vision_config(n_blocks=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HtcVlmForConditionalGeneration(made).eval()
    model.generation_config.suppress_tokens = [IMAGE, BOTTLENECK]
    return model


def forget() -> None:
    """Let go of the models that `shared` keeps."""
    _shared.cache_clear()


def pixels(n_images: int, seed: int = 0) -> Tensor:
    """(n_images, 3, 32, 32), normalised."""
    return torch.randn(n_images, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def image_ids(model: HtcVlmForConditionalGeneration) -> list[int]:
    """What one image is in input_ids: C visual placeholders and K bottleneck tokens."""
    compressor = model.model.compressor
    return [IMAGE] * compressor.n_visual(N_PATCHES) + [BOTTLENECK] * compressor.n_bottleneck


def rows(model: HtcVlmForConditionalGeneration) -> list[list[int]]:
    """Three prompts of different lengths with 2, 0 and 1 images, not always in front."""
    image = image_ids(model)
    return [[4, 5, *image, 6, 7, *image, 8], [9, 10, 11], [*image, 12, 13, 14, 15]]


N_IMAGES = (2, 0, 1)  # of `rows`


def batch(prompts: Sequence[Sequence[int]], n_extra: int = 0, side: str = "left") -> dict[str, Any]:
    """Padded input_ids and attention_mask; n_extra more columns of padding than needed."""
    length = max(map(len, prompts)) + n_extra
    gaps = [length - len(row) for row in prompts]
    before = [gap if side == "left" else 0 for gap in gaps]
    ids = [[PAD] * n + list(row) + [PAD] * (gap - n) for row, gap, n in zip(prompts, gaps, before, strict=True)]
    mask = [[0] * n + [1] * len(row) + [0] * (gap - n) for row, gap, n in zip(prompts, gaps, before, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def is_text(inputs: dict[str, Tensor]) -> Tensor:
    """(B, L) bool"""
    ids = inputs["input_ids"]
    return inputs["attention_mask"].bool() & (ids != IMAGE) & (ids != BOTTLENECK)


@torch.no_grad()
def text_logits(model: HtcVlmForConditionalGeneration, inputs: dict[str, Tensor], **images: Any) -> list[Tensor]:
    """Per sample, the (T, vocabulary) logits at its text tokens, from one pass over the whole prompt."""
    logits = model(**inputs, **images).logits
    return [row[here] for row, here in zip(logits, is_text(inputs), strict=True)]


def assert_close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=0)
