"""The sizes that are measured, and models of them with random weights, made where they run.

Source:  LLaVA-1.5-7B's config.json and the preset llava-1.5-7b for `7b`; VoCo-LLaMA and LLaVA-1.5 for LoRA of rank 128.
Differs: `small` keeps LLaVA's 576 patches and the paper's 4 anchors in a decoder that two CPU cores run in seconds; `tiny` is
         for the tests. Speed does not depend on trained weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration
from htc_vlm.model.add_compressor import meta_model
from htc_vlm.ops.cost import DecoderShape
from htc_vlm.train import presets


@dataclass(frozen=True)
class Shape:
    """What is run. Batches count images or prompts; a question has n_question tokens."""

    name: str
    dtype: str
    compress_batches: tuple[int, ...] = (1, 8, 32)
    ask_batches: tuple[int, ...] = (1, 8, 64)
    decode_batches: tuple[int, ...] = (1, 8, 64)
    n_question: int = 40
    n_new: int = 32
    train_images: int = 8
    train_text: int = 64
    lora_rank: int = 128
    checkpointing: bool = True
    repeats: int = 10
    warmup: int = 3
    matmul_side: int = 8192
    copy_mib: int = 2048


SHAPES = {
    "7b": Shape("7b", dtype="bfloat16"),
    "small": Shape(
        "small", dtype="float32", compress_batches=(1, 8), ask_batches=(1, 8), decode_batches=(1, 8), n_new=16,
        train_images=2, lora_rank=16, checkpointing=False, repeats=5, warmup=1, matmul_side=2048, copy_mib=512,
    ),
    "tiny": Shape(
        "tiny", dtype="float32", compress_batches=(1, 8), ask_batches=(1, 2), decode_batches=(1, 2), n_question=6, n_new=3,
        train_images=2, train_text=6, lora_rank=2, checkpointing=True, repeats=2, warmup=1, matmul_side=128, copy_mib=1,
    ),
}  # fmt: skip

_SMALLER: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"image_size": 336, "patch_size": 14, "hidden_size": 256, "intermediate_size": 1024, "layers": 4, "heads": 4},
        "text": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376, "layers": 8, "heads": 4},
        "quantizer": {"preset": "tiny", "image_size": 336},
    },
    "tiny": {
        "vision": {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2},
        "text": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4},
        "quantizer": {
            "image_size": 32, "widths": [8, 8, 8], "depths": [1, 1, 1], "latent_channels": 8, "codebook_size": 16, "groups": 2,
        },
    },
}  # fmt: skip


def config_of(shape: Shape) -> HtcVlmConfig:
    """The model's configuration: HTC with 4 anchors and 1 bottleneck token."""
    if shape.name == "7b":
        return meta_model(presets.read(presets.find("llava-1.5-7b"))).config
    sizes = {part: dict(_SMALLER[shape.name][part]) for part in ("vision", "text")}
    for part in sizes.values():
        part |= {"num_hidden_layers": part.pop("layers"), "num_attention_heads": part.pop("heads")}
    n_vocabulary = sizes["text"]["vocab_size"]
    text = LlamaConfig(**sizes["text"], max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return HtcVlmConfig(
        vision_config=CLIPVisionConfig(**sizes["vision"]),
        text_config=text,
        compressor={"name": "htc", "n_anchors": 4, "quantizer": _SMALLER[shape.name]["quantizer"]},
        tie_word_embeddings=False,
        image_token_index=n_vocabulary - 2,
        bottleneck_token_id=n_vocabulary - 1,
        pad_token_id=0,
    )


def build(shape: Shape, device: torch.device) -> HtcVlmForConditionalGeneration:
    """Random weights, drawn on `device` in the dtype that they are used in: no copy through the CPU's memory."""
    torch.manual_seed(0)
    config = config_of(shape)
    with torch.device(device), _default_dtype(dtype_of(shape)):
        model = HtcVlmForConditionalGeneration(config)
    return model.eval().requires_grad_(False)


def dtype_of(shape: Shape) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[shape.dtype]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def describe(shape: Shape, model: HtcVlmForConditionalGeneration) -> dict[str, Any]:
    """The numbers that belong beside every result."""
    compressor, config = model.model.compressor, model.config
    n_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return {
        **asdict(shape),
        "decoder": asdict(DecoderShape.from_config(config.text_config)),
        "compressor": compressor.to_dict(),
        "n_patches": n_patches,
        "n_visual": compressor.n_visual(n_patches),
        "n_bottleneck": compressor.n_bottleneck,
        "attention": config.text_config._attn_implementation,
        "parameters": {
            "vision_tower": _count(model.model.vision_tower),
            "projector": _count(model.model.multi_modal_projector),
            "language_model": _count(model.model.language_model) + _count(model.lm_head),
            "quantizer": _count(compressor.quantizer),
            "anchor_mlp": _count(compressor.to_anchors),
        },
    }


def _count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
