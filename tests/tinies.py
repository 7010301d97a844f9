"""Tiny random models, prompts and checkpoints that the tests of model/ and compressors/ share.

One image is 32 x 32 pixels in patches of 8: P = 16. The language model has 3 layers and grouped key-value heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.testing.tiny_llava import (  # noqa: F401  (tests take them from here)
    BOTTLENECK,
    IMAGE,
    N_IMAGES,
    N_LAYERS,
    N_PATCHES,
    N_VOCABULARY,
    PAD,
    TOLERANCE,
    assert_close,
    batch,
    build,
    config,
    image_ids,
    is_text,
    pixels,
    rows,
    shared,
    text_config,
    text_logits,
    vision_config,
)  # fmt: skip

WORDS = (
    "what is on the left right top of a an red green blue square circle ? . yes no how many one two three where "
    "and first second picture : user assistant it"
).split()[: IMAGE - 4]
TINY_CODE = {
    "image_size": 32, "widths": [8, 8, 8], "depths": [1, 1, 1], "latent_channels": 8, "codebook_size": 16, "groups": 2,
}  # fmt: skip


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


def save_llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT checkpoint of random weights with the processor of its family; it knows the words of `tiny-upper`.

    Pictures of other shapes have other numbers of tiles, hence of tokens. Random weights are large enough for clear answers.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from htc_vlm import load
    from htc_vlm.testing.families import PINPOINTS, TEXT, VISION

    tokenizer = load("tiny-upper")[1].tokenizer
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<image>"
        "{% endif %}{% endfor %} {% endfor %}"
    )
    LlavaNextProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    options = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaNextForConditionalGeneration(options).save_pretrained(folder)
    return folder
