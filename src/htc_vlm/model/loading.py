"""Load a checkpoint by name or path, with its processor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from htc_vlm.applied.families import family_of
from htc_vlm.files import read_object
from htc_vlm.model import adapter as adapters
from htc_vlm.model import bottlenecks
from htc_vlm.model.add_compressor import LLAVA_TYPES, with_compressor
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration, check_llava
from htc_vlm.model.movable import check_decoder
from htc_vlm.model.processing import HtcVlmProcessor

SHIPPED = Path(__file__).parents[1] / "checkpoints"
NOT_SHIPPED = ("photo", "photo-upper")


def shipped() -> list[str]:
    """Names of the checkpoints inside the package."""
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def load(
    name_or_path: str | os.PathLike[str],
    compressor: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """`load("tiny")`, or the folder of a checkpoint -> (model in eval mode, processor).

    LLaVA-1.5 and HTC-VLM checkpoints become ours, those of other families too where a bottleneck was put into them
    (`htc-vlm convert`); other vision-language models are transformers' own (`families`).
    compressor: use these weights with another method (e.g. {"name": "voco"} on an uncompressed model is the paper's
    lower bound). adapter: a folder that `save_adapter` wrote; the base answers text and whole images as without it
    (`without_compression(model)`), and from compressed ones. kwargs go to from_pretrained. FileNotFoundError, or ValueError
    where weights and settings do not fit.
    """
    with _without_progress_bars():
        if adapter is not None:
            if compressor is not None:
                raise ValueError("give compressor=... or adapter=..., not both: an adapter brings its compressor")
            about = adapters.read_about(adapter)
            model, processor = _load(find(name_or_path), about["compressor"], dtype, kwargs)
            adapters.restore(model, adapter, about)
            return model, processor
        return _load(find(name_or_path), compressor, dtype, kwargs)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar even for a checkpoint that loads at once."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _load(
    folder: Path, compressor: Mapping[str, Any] | None, dtype: torch.dtype | str, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    if compressor is not None:
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)} cannot be combined with compressor=...; load without, then convert")
        model, processor = with_compressor(folder, compressor, dtype=dtype)
        model.image_processor = processor.image_processor
        return model.eval(), processor
    kind = model_type(folder)
    if not is_ours(kind):
        return _load_stock(folder, dtype, kwargs)
    cls = HtcVlmForConditionalGeneration if kind in LLAVA_TYPES else bottlenecks.classes_of(kind).model
    try:
        model, info = cls.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged weights ({error}); copy or train the checkpoint again") from error
    mismatched = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]]
    wrong = sorted(mismatched) or sorted(info["missing_keys"]) or sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"{folder}: weights do not fit its config.json, e.g. {wrong[0]}; convert it with `htc-vlm convert`"
        )
    check_decoder(model)
    processor = load_processor(folder, model.config)
    model.image_processor = processor.image_processor
    return model.eval(), processor


def model_type(folder: Path) -> str:
    """What config.json says a checkpoint is."""
    return str(read_object(folder / "config.json").get("model_type"))


def _load_stock(folder: Path, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> Any:
    """transformers' own model and processor. ValueError for a model that `apply` finds no way in."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged weights ({error}); copy the checkpoint again") from error
    family_of(model)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def is_ours(kind: str) -> bool:
    """Does a model type have a compressor of its own, if only "none"? Other models are transformers'."""
    return kind in LLAVA_TYPES or bottlenecks.is_ours(kind)


def load_processor(folder: Path, config: Any) -> Any:
    """The processor beside a checkpoint; counts are those of the model, whatever processor was saved there."""
    llava = not bottlenecks.is_ours(config.model_type)
    cls = HtcVlmProcessor if llava else bottlenecks.classes_of(config.model_type).processor
    return cls.from_pretrained(folder).fitted_to(config)


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """A folder with a checkpoint as it is, or a shipped one by name. FileNotFoundError lists what there is."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"load takes a folder or a name, not {name_or_path!r}; shipped: {', '.join(shipped()) or 'none'}")
    path = Path(name_or_path)
    if (path / "config.json").is_file():
        return path
    if str(name_or_path) in shipped():
        return SHIPPED / str(name_or_path)
    if str(name_or_path) in NOT_SHIPPED:
        raise FileNotFoundError(
            f"{name_or_path}: no weights of the preset `photo` are shipped yet. Train it (`htc-vlm train --preset photo`, "
            f"docs/photo.md) and give the folder OUTPUT/model; shipped: {', '.join(shipped())}"
        )
    if path.is_dir():
        raise FileNotFoundError(f"{name_or_path}: holds no checkpoint (no config.json); training leaves one in OUTPUT/model")
    raise FileNotFoundError(
        f"{name_or_path}: no such folder, and no shipped checkpoint of that name; "
        f"shipped: {', '.join(shipped()) or 'none'}"
    )


def to_device(model: Any, device: str) -> Any:
    """`model.to(device)`. ValueError where there is no such device here."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r}: no kind of device; write e.g. cpu, cuda or cuda:1") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices; cpu always works")
    try:
        return model.to(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: the model cannot be moved there ({' '.join(str(error).split())})") from error


def without_compression(model: HtcVlmForConditionalGeneration) -> HtcVlmForConditionalGeneration:
    """The same weights (shared, not copied) without compression: what the images would cost without it."""
    check_llava(model, "the same weights without compression")
    options = {**model.config.to_dict(), "compressor": {"name": "none"}}
    config = HtcVlmConfig.from_dict(options)
    config.text_config._attn_implementation = model.config.text_config._attn_implementation
    with torch.device("meta"):
        twin = HtcVlmForConditionalGeneration(config)
    twin.model.vision_tower = model.model.vision_tower
    twin.model.multi_modal_projector = model.model.multi_modal_projector
    twin.model.language_model = model.model.language_model
    twin.lm_head = model.lm_head
    twin.generation_config = model.generation_config
    return twin.eval()
