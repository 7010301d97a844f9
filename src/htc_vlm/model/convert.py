"""Checkpoints in, HTC-VLM checkpoints out: a compressor added to a LLaVA, the original LLaVA-1.5 layout, MGVQ files.

Source:  llava-hf checkpoints (transformers' LlavaForConditionalGeneration); liuhaotian/llava-v1.5 (LLaVA commit
         c121f04); the official MGVQ files.
Differs: nothing is loaded half: a missing or unexpected weight is an error that names it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.convert_mgvq import mgvq_state_dict
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration
from htc_vlm.model.processing import HtcVlmProcessor

BOTTLENECK_TOKEN = "<voco>"

__all__ = ["add_bottleneck_token", "llava_state_dict", "mgvq_state_dict", "with_compressor"]


def with_compressor(
    path: str | os.PathLike[str],
    compressor: Mapping[str, Any],
    mgvq: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
    allow_untrained_quantizer: bool = False,
) -> tuple[HtcVlmForConditionalGeneration, HtcVlmProcessor]:
    """A LLaVA checkpoint (ours or Hugging Face's) with another compressor: the start of the compress stage.

    mgvq: file or folder with the quantizer's weights (ours or the official ones); needed by htc with a code, unless
    the checkpoint already holds one of the same shape. Raises ValueError for weights that do not fit.
    """
    config = HtcVlmConfig.from_pretrained(path)
    config.compressor = dict(compressor)
    config = HtcVlmConfig.from_dict(config.to_dict())  # checks the settings
    processor = HtcVlmProcessor.from_pretrained(path)
    config.image_mean = list(processor.image_processor.image_mean)
    config.image_std = list(processor.image_processor.image_std)
    model, info = HtcVlmForConditionalGeneration.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True
    )
    missing = [name for name in info["missing_keys"] if not name.startswith("model.compressor.")]
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith("model.compressor.")]
    if missing or unexpected:
        raise ValueError(f"{path} does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    if model.model.compressor.n_bottleneck:
        add_bottleneck_token(model, processor.tokenizer)
    quantizer = [name for name in info["missing_keys"] if name.startswith("model.compressor.quantizer.")]
    if mgvq is not None:
        load_mgvq(model, mgvq)
    elif quantizer and not allow_untrained_quantizer:
        raise ValueError("this compressor's quantizer has no weights yet; give an MGVQ file (mgvq=..., --mgvq FILE)")
    rebuilt = HtcVlmProcessor.for_config(
        model.config, processor.image_processor, processor.tokenizer, chat_template=processor.chat_template,
        image_token=processor.image_token, num_additional_image_tokens=processor.num_additional_image_tokens,
    )  # fmt: skip
    return model, rebuilt


def add_bottleneck_token(model: HtcVlmForConditionalGeneration, tokenizer: Any) -> int:
    """Give the bottleneck token an id: the tokenizer's own if it has it, else a new one. The embedding grows if it
    must; the new row starts as the mean embedding. generate is told never to write placeholders."""
    unknown = tokenizer.convert_tokens_to_ids(BOTTLENECK_TOKEN) in (None, tokenizer.unk_token_id)
    if unknown:
        tokenizer.add_special_tokens({"extra_special_tokens": [BOTTLENECK_TOKEN]}, replace_extra_special_tokens=False)
    token_id = int(tokenizer.convert_tokens_to_ids(BOTTLENECK_TOKEN))
    embedding = model.get_input_embeddings()
    if token_id >= embedding.weight.shape[0]:
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    if unknown:
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            if weight.device.type != "meta":
                weight.data[token_id] = weight.data[:token_id].float().mean(dim=0).to(weight.dtype)
    model.config.bottleneck_token_id = token_id
    model.generation_config.suppress_tokens = [model.config.image_token_id, token_id]
    return token_id


def load_mgvq(model: HtcVlmForConditionalGeneration, path: str | os.PathLike[str]) -> None:
    """Load a quantizer's encoder and codebooks (an MGVQ.save folder, or an official .pt/.safetensors file); strict."""
    state = read_mgvq(path)
    quantizer: Any = model.model.compressor.quantizer
    wanted = quantizer.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith(("decoder.", "post_quant_conv."))}
    wrong = sorted(set(wanted) ^ set(kept)) + [n for n in wanted if n in kept and wanted[n].shape != kept[n].shape]
    if wrong:
        raise ValueError(
            f"{path}: not the quantizer that this compressor was configured for; first difference: {wrong[0]}"
        )
    quantizer.load_state_dict(kept)


def read_mgvq(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Our own folder or file as it is; official files renamed."""
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no MGVQ weights there (a folder written by MGVQ.save, or an official file)")
    state = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    )
    ours = any(name.startswith("quantizer.") for name in state)
    return dict(state) if ours else mgvq_state_dict(state)


_ORIGINAL = (
    (r"model\.vision_tower\.vision_tower\.", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)


def llava_state_dict(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights named as in liuhaotian/llava-v1.5 -> as in transformers. ValueError for a name that is not LLaVA's.

    >>> sorted(llava_state_dict({"model.mm_projector.2.bias": torch.zeros(1), "model.norm.weight": torch.ones(1)}))
    ['model.language_model.norm.weight', 'model.multi_modal_projector.linear_2.bias']
    """
    out = {}
    for name, value in original.items():
        if name.endswith("rotary_emb.inv_freq"):  # computed, not a weight
            continue
        for pattern, replacement in _ORIGINAL:
            renamed, n_found = re.subn(f"^{pattern}", replacement, name)
            if n_found:
                out[renamed] = value
                break
        else:
            raise ValueError(f"{name!r} is not a weight of the original LLaVA-1.5 layout")
    return out


def read_original(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All weight files (.safetensors or .bin) of an original LLaVA-1.5 folder, renamed. The vision tower may be
    absent: there it is a CLIP folder of its own."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors and no pytorch_model*.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        part = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        state.update(part)
    return llava_state_dict(state)


def is_original_layout(path: str | os.PathLike[str]) -> bool:
    """Is this a liuhaotian/llava folder (its config names `mm_vision_tower`), not a Hugging Face LLaVA?"""
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path}: no config.json there; give a checkpoint folder")
    try:
        return "mm_vision_tower" in json.loads(config.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{config}: not JSON ({error})") from error
