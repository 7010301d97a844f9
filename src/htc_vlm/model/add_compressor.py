"""Checkpoints in, HTC-VLM checkpoints out: a compressor added to a LLaVA, the original LLaVA-1.5 layout, MGVQ files.

Source:  llava-hf checkpoints (transformers' LlavaForConditionalGeneration); liuhaotian/llava-v1.5 (LLaVA commit
         c121f04); the official MGVQ files.
Differs: nothing is loaded half: a missing or unexpected weight is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from htc_vlm import compressors
from htc_vlm.convert import llava_original
from htc_vlm.convert.llava_original import CLIP_336_CONFIG, is_original_layout, llava_state_dict
from htc_vlm.data.prompts import VICUNA_V1
from htc_vlm.files import read_object
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.generation_defaults import check_defaults
from htc_vlm.model.load_report import holds_weights, without_load_report
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration
from htc_vlm.model.movable import check_decoder
from htc_vlm.model.processing import HtcVlmProcessor

BOTTLENECK_TOKEN = "<voco>"
QUANTIZER = "model.compressor.quantizer."
LLAVA_TYPES = ("llava", "htc_vlm")
NO_QUANTIZER = "this compressor's quantizer has no weights yet; give an MGVQ file (mgvq=..., --mgvq FILE)"
# Sizes of the checkpoints that presets may name as `base`, from their config.json.
LLAVA_7B = "llava-hf/llava-1.5-7b-hf"
BASES: dict[str, dict[str, Any]] = {
    LLAVA_7B: {
        "vision": CLIP_336_CONFIG,
        "text": {
            "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "bottleneck_token_id": 32002,  # the first free row: the tokenizer has 32002 entries
    },
}  # fmt: skip

__all__ = [
    "add_bottleneck_token",
    "base_config",
    "is_original_layout",
    "llava_state_dict",
    "meta_model",
    "with_compressor",
]


def with_compressor(
    path: str | os.PathLike[str],
    compressor: Mapping[str, Any],
    mgvq: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
    allow_untrained_quantizer: bool = False,
    vision: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """A LLaVA checkpoint (ours, Hugging Face's or the original) with another compressor: where the compress stage starts.
    Checkpoints of other families (`bottlenecks.STOCK`) get a bottleneck, see `add_to_family.with_bottleneck`.

    mgvq: file or folder with the quantizer's weights (ours or the official ones); needed by htc with a code, unless
    the checkpoint already holds one of the same shape. vision: a CLIP folder, for original checkpoints without their
    vision tower. Raises ValueError for weights that do not fit.
    """
    if not isinstance(compressor, Mapping) or not isinstance(compressor.get("name"), str):
        raise ValueError(f"compressor is {compressor!r}; give a mapping with its name, e.g. {{'name': 'voco'}}")
    kind = family_type(path)
    if kind is not None:
        from htc_vlm.model.add_to_family import with_bottleneck

        if vision is not None:
            raise ValueError(f"{path}: a {kind} checkpoint has its own vision tower; leave out --vision")
        return with_bottleneck(path, kind, compressor, mgvq, dtype, allow_untrained_quantizer)
    base = _read_base(path, compressor, vision)
    if mgvq is not None:
        refuse_unread(compressors.build(**base.config.compressor), mgvq)
    elif not allow_untrained_quantizer:
        _refuse_missing_quantizer(base)
    with without_load_report():  # check_fit says what is missing
        model, info = HtcVlmForConditionalGeneration.from_pretrained(
            base.path, config=base.config, state_dict=base.state, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    check_fit(path, info)
    check_defaults(model.generation_config, path)
    check_decoder(model)
    if base.state is not None:  # the original's generate never meets <image>; ours could write it
        model.generation_config.suppress_tokens = [model.config.image_token_id]
    if model.model.compressor.n_bottleneck:
        add_bottleneck_token(model, base.tokenizer)
    quantizer = [name for name in info["missing_keys"] if name.startswith(QUANTIZER)]
    if mgvq is not None:
        load_quantizer(model, mgvq)
    elif quantizer and not allow_untrained_quantizer:
        raise ValueError(NO_QUANTIZER)
    processor = HtcVlmProcessor.for_config(
        model.config, base.image_processor, base.tokenizer, **base.processor_options
    )
    if processor.chat_template is None:  # the original layout has none: its format is in LLaVA's code
        processor.set_style(VICUNA_V1)
    model.image_processor = processor.image_processor
    return model, processor


def family_type(path: str | os.PathLike[str]) -> str | None:
    """The model type of a checkpoint of another family than LLaVA; None for LLaVA's, and where there is no config.json."""
    file = Path(path) / "config.json"
    kind = str(read_object(file).get("model_type")) if file.is_file() else "llava"
    return None if kind in LLAVA_TYPES or is_original_layout(path) else kind


def _refuse_missing_quantizer(base: _Base) -> None:
    """ValueError, before gigabytes are read, where the compressor reads a code that nothing here can make."""
    made: Any = compressors.build(**base.config.compressor)
    if getattr(made, "has_code", False) and (base.path is None or not holds_weights(base.path, QUANTIZER)):
        raise ValueError(NO_QUANTIZER)


@dataclass(frozen=True)
class _Base:
    """What a model is made from. path is None where `state` holds the weights."""

    path: str | os.PathLike[str] | None
    state: dict[str, Tensor] | None
    config: HtcVlmConfig
    tokenizer: Any
    image_processor: Any
    processor_options: dict[str, Any]


def _read_base(
    path: str | os.PathLike[str], compressor: Mapping[str, Any], vision: str | os.PathLike[str] | None
) -> _Base:
    if is_original_layout(path):
        original = llava_original.read(path, vision)
        normalised = {"image_mean": original.image_processor.image_mean, "image_std": original.image_processor.image_std}
        config = HtcVlmConfig(**original.options, **normalised, compressor=dict(compressor))
        has_cls = original.options["vision_feature_select_strategy"] == "default"
        options = {"image_token": llava_original.IMAGE_TOKEN, "num_additional_image_tokens": int(has_cls)}
        return _Base(None, original.state, config, original.tokenizer, original.image_processor, options)
    if vision is not None:
        raise ValueError(f"{path} is a Hugging Face checkpoint, which has its own vision tower; leave out --vision")
    config = HtcVlmConfig.from_pretrained(path)
    processor = HtcVlmProcessor.from_pretrained(path)
    config.compressor = dict(compressor)
    config.image_mean = list(processor.image_processor.image_mean)
    config.image_std = list(processor.image_processor.image_std)
    config = HtcVlmConfig.from_dict(config.to_dict())  # checks the settings
    options = {
        "chat_template": processor.chat_template,
        "prompt_style": processor.prompt_style,
        "image_token": processor.image_token,
        "num_additional_image_tokens": processor.num_additional_image_tokens,
    }
    return _Base(path, None, config, processor.tokenizer, processor.image_processor, options)


def check_fit(path: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """ValueError, naming some, unless every weight outside the compressor was found in its right size."""
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("model.compressor."))
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.startswith("model.compressor."))
    wrong = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"])
    if missing or unexpected or wrong:
        raise ValueError(
            f"{path} does not fit its config.json: missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"of another size {wrong[:5]}"
        )


def meta_model(preset_or_compressor: Mapping[str, Any], stage: str = "compress") -> HtcVlmForConditionalGeneration:
    """A model of real size without memory (meta device): its shapes, parameter counts and costs, no numbers.

    preset_or_compressor: a preset (`htc_vlm.train.presets.read`), of which `stage` is built; or a compressor's name and
    settings on LLaVA-1.5-7B.
    """
    preset = preset_or_compressor
    if "stages" not in preset:
        preset = {"base": LLAVA_7B, "stages": {stage: {"compressor": dict(preset_or_compressor)}}}
    if stage not in preset["stages"]:
        raise ValueError(f"the preset has no stage {stage!r}; it has: {', '.join(preset['stages'])}")
    name = preset.get("base")
    if name not in BASES:
        raise ValueError(f"the preset's `base` is {name!r}, whose sizes are not known here; known: {', '.join(BASES)}")
    compressor = preset["stages"][stage].get("compressor", {"name": "none"})
    with torch.device("meta"):
        return HtcVlmForConditionalGeneration(base_config(name, compressor)).eval()


def base_config(name: str, compressor: Mapping[str, Any]) -> HtcVlmConfig:
    """The configuration of a checkpoint in BASES, written down here, with a compressor."""
    base = BASES[name]
    ids = {key: base[key] for key in ("image_token_index", "pad_token_id", "bottleneck_token_id")}
    text = LlamaConfig(**base["text"], pad_token_id=base["pad_token_id"], bos_token_id=1, eos_token_id=2)
    return HtcVlmConfig(
        vision_config=CLIPVisionConfig(**base["vision"]), text_config=text, compressor=dict(compressor),
        tie_word_embeddings=False, **ids,
    )  # fmt: skip


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


def refuse_unread(compressor: Any, mgvq: str | os.PathLike[str]) -> None:
    """ValueError where the weights of a quantizer are given to a method that has none."""
    if not getattr(compressor, "has_code", False):
        raise ValueError(f"{mgvq}: compressor {compressor.name!r} reads no quantizer's code; leave out mgvq (--mgvq)")


def load_quantizer(model: HtcVlmForConditionalGeneration, path: str | os.PathLike[str]) -> None:
    """Load the weights that the compressor's quantizer reads from a file or folder (`Quantizer.read_weights`); strict."""
    refuse_unread(model.model.compressor, path)
    quantizer: Any = model.model.compressor.quantizer
    state = quantizer.read_weights(Path(path))
    wanted = quantizer.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith(("decoder.", "post_quant_conv."))}
    wrong = sorted(set(wanted) ^ set(kept)) + [n for n in wanted if n in kept and wanted[n].shape != kept[n].shape]
    if wrong:
        raise ValueError(
            f"{path}: not the quantizer that this compressor was configured for; first difference: {wrong[0]}"
        )
    quantizer.load_state_dict(kept)
