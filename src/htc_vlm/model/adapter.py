"""A compressor as an adapter of a stock model: LoRA and the compressor's own weights, at work only while an image is read.

The text runs through the base model's own weights, bit for bit. So one checkpoint in memory answers from whole images, from
text alone and from compressed images, and a compressor is a small file.

    model, processor = htc_vlm.load("llava-1.5-7b-hf", adapter="my-adapter")

Source:  Hu et al. 2021, arXiv:2106.09685 (LoRA), by PEFT; VisCo, arXiv:2607.12756, whose LoRA is also active only while the
         image is read.
Differs: VisCo's bottleneck is its own; ours is whatever `reads_apart` (compressors/readers.py; with one reader and one look it
         is VoCo-LLaMA's, with `channels: hybrid` it has HTC-VLM's anchors). Methods of one masked pass are refused: there, the
         image and the text share each matrix product.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from htc_vlm.files import read_object, replacing, write_json
from htc_vlm.model.weights_digest import ADAPTER, weights_digest

NAME = ADAPTER  # of the PEFT adapter
WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
COMPRESSOR = "model.compressor."
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA's rank, alpha (the update is scaled by alpha / rank), dropout, and which matrices of the language model have one."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: tuple[str, ...] = MATRICES


def is_adapter_weight(name: str) -> bool:
    """Does a parameter of this name belong to the adapter's LoRA?

    >>> is_adapter_weight("model.language_model.layers.0.self_attn.q_proj.lora_A.image_reader.weight")
    True
    """
    return f".{NAME}." in name


def add(model: Any, settings: LoraSettings | None = None) -> None:
    """Put a new LoRA (which changes nothing yet) on the language model. ValueError for methods of one masked pass."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraSettings() if settings is None else settings
    compressor = model.model.compressor
    if not compressor.reads_apart:
        raise ValueError(
            f"an adapter acts while an image is read, and {compressor.name!r} is trained in one pass with the text; use "
            "readers (n_readers: 1, n_looks: 1 is VoCo-LLaMA's bottleneck)"
        )
    model.adapter = {"lora": asdict(settings), "base": _base_digest(model)}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(settings.modules)
    )
    inject_adapter_in_model(config, model.get_decoder(), adapter_name=NAME)
    for layer in _layers(model.get_decoder()):
        layer._disable_adapters = True  # the flag alone: peft's enable_adapters would also stop the weights from learning


def _base_digest(model: Any) -> str:
    """Of the language model, without the bottleneck token's row: a new one is a mean, which is not the same in every dtype."""
    decoder = model.get_decoder()
    table = next(name for name, weight in decoder.named_parameters() if weight is model.get_input_embeddings().weight)
    return weights_digest(decoder, inside=model, without=(table, model.config.bottleneck_token_id))


def _layers(language_model: nn.Module) -> list[Any]:
    """The linear layers that carry the adapter."""
    return [part for part in language_model.modules() if NAME in getattr(part, "lora_A", {})]


@contextmanager
def at_work(language_model: nn.Module) -> Iterator[None]:
    """Inside the block the language model computes with the adapter, if it carries one."""
    layers = _layers(language_model)
    for layer in layers:
        layer._disable_adapters = False
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = True


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write adapter.safetensors and adapter.json. ValueError for a model without an adapter."""
    if getattr(model, "adapter", None) is None:
        raise ValueError("this model has no adapter; train one with `trains: adapter`, or use save_pretrained")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"compressor": model.config.compressor, **model.adapter}
    with replacing(folder / WEIGHTS) as partial:
        save_file({name: value.contiguous() for name, value in weights(model).items()}, partial)
    write_json(folder / ABOUT, about, indent=1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter is made of: the compressor's own weights and the LoRA."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if name.startswith(COMPRESSOR) or is_adapter_weight(name)}


def read_about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """adapter.json. FileNotFoundError where the folder holds no adapter."""
    file = Path(folder) / ABOUT
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: holds no adapter (no {ABOUT}); model.save_adapter writes one")
    return read_object(file, "save the adapter again")


def restore(model: Any, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
    """Put a saved adapter on its base model. ValueError where it was trained on other weights, or does not fit."""
    lora = {**about["lora"], "modules": tuple(about["lora"]["modules"])}
    add(model, LoraSettings(**lora))
    is_base = about["base"] == model.adapter["base"]
    if not is_base and about["base"] != weights_digest(model.get_decoder(), inside=model):  # with that row, as once written
        raise ValueError(
            f"{folder}: this adapter was trained on a language model with digest {about['base'][:16]}, this one has "
            f"{model.adapter['base'][:16]}; load it with its own base"
        )
    saved, wanted = load_file(Path(folder) / WEIGHTS), weights(model)
    wrong = sorted(set(saved) ^ set(wanted)) + [n for n in wanted if n in saved and wanted[n].shape != saved[n].shape]
    if wrong:
        raise ValueError(f"{folder}: its weights are not those of its settings, e.g. {wrong[0]}; save the adapter again")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(saved[name])
    model.adapter_file = Path(folder).absolute() / WEIGHTS  # where float16 weights are not rounded yet
