"""Tiny random models, prompts and checkpoints that the tests of model/ and compressors/ share.

One image is 32 x 32 pixels in patches of 8: P = 16. The language model has 3 layers and grouped key-value heads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration

N_PATCHES, N_LAYERS = 16, 3
PAD, IMAGE, BOTTLENECK = 0, 38, 39
N_VOCABULARY = 40  # 0 pad, 1 end, 2 unknown, 3 begin, 4 to 37 words, 38 <image>, 39 <voco>
WORDS = (
    "what is on the left right top of a an red green blue square circle ? . yes no how many one two three where "
    "and first second picture : user assistant it"
).split()[: IMAGE - 4]
TINY_CODE = {
    "image_size": 32, "widths": [8, 8, 8], "depths": [1, 1, 1], "latent_channels": 8, "codebook_size": 16, "groups": 2,
}  # fmt: skip
TOLERANCE = 1e-4  # of logits about 10 in size, in float32


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
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


def batch(prompts: Sequence[Sequence[int]], n_extra: int = 0, side: str = "left") -> dict[str, Tensor]:
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


@torch.no_grad()
def greedy(model: HtcVlmForConditionalGeneration, inputs: dict[str, Tensor], n_new: int, **images: Any) -> Tensor:
    """(B, n_new) ids, each from a full pass over everything before it; placeholders are never chosen."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(n_new):
        if model.model.compressor.n_fusion:  # what was generated is not read by pre-fusion
            images["is_answer"] = torch.nn.functional.pad(torch.zeros_like(inputs["input_ids"]).bool(), (0, step), value=True)
        logits = model(input_ids=ids, attention_mask=mask, **images).logits[:, -1]
        ids = torch.cat((ids, logits[:, :IMAGE].argmax(-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids[:, -n_new:]


# ------------------------------------------------------------------------------------------------ checkpoints on disk
def tokenizer() -> Any:
    """A word tokenizer without `<voco>`: 39 entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", "<s>", *WORDS]
    names += [f"word{i}" for i in range(len(names), IMAGE)] + ["<image>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=512,
    )  # fmt: skip


def image_processor() -> Any:
    return LlavaImageProcessor(
        do_pad=False, do_resize=True, size={"shortest_edge": 32}, do_center_crop=True,
        crop_size={"height": 32, "width": 32},
    )  # fmt: skip


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def save_llava(folder: Path) -> Path:
    """A stock Hugging Face LLaVA checkpoint with its processor, under the names of the hub; vocabulary of 39."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"vision_config": vision_config(), "text_config": text_config(N_VOCABULARY - 1)}
        stock = LlavaForConditionalGeneration(
            LlavaConfig(**options, image_token_index=IMAGE, image_seq_length=N_PATCHES, tie_word_embeddings=False)
        )
    stock.save_pretrained(folder)
    LlavaProcessor(
        image_processor(), tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pictures(n: int) -> list[Image.Image]:
    """Random RGB pictures of different sizes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 48, 3), dtype=np.uint8)) for i in range(n)]
