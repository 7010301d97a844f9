"""The tokenizer stage of a preset: which pictures MGVQ learns from, and the preset's settings for it.

Source:  the preset's `data` and `stages.tokenizer`; the loop is train/train_quantizer.py.
Differs: from MGVQ (ImageNet): pictures of the preset's own data sets, training splits only.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from htc_vlm.train import presets
from htc_vlm.train.train_quantizer import Pictures, TokenizerTraining, stack_pictures, train_tokenizer

N_PICTURES = 5500
N_HELD_OUT = 100  # of the first data set's validation split


def train_tokenizer_stage(preset: dict[str, Any], output: Path, data: Path | None = None) -> dict[str, Any]:
    """Train on the preset's pictures, in the shares of its `data`; raises ValueError for unknown settings."""
    if data is not None:
        os.environ["HTC_VLM_DATA"] = str(data)
    if "tokenizer" not in preset["stages"]:
        raise ValueError(f"preset {preset.get('name')!r} has no stage 'tokenizer'; it has: {', '.join(preset['stages'])}")
    block = dict(preset["stages"]["tokenizer"])
    size, n_pictures = block.pop("image_size", None), block.pop("n_pictures", N_PICTURES)
    if not isinstance(size, int) or not isinstance(n_pictures, int):
        raise ValueError(f"image_size is {size!r}; give the pictures' side in pixels; n_pictures: a whole number")
    known = {field.name for field in fields(TokenizerTraining)}
    if unknown := sorted(set(block) - known):
        raise ValueError(f"unknown stage setting {unknown[0]!r}; known: image_size, n_pictures, {', '.join(sorted(known))}")
    for setting in fields(TokenizerTraining):
        if setting.name in block:
            block[setting.name] = presets.typed(setting.name, block[setting.name], setting.type)
    parts = [presets.DataPart(**options) for options in preset["data"]]
    total = sum(part.share for part in parts)
    pictures = [_pictures(part.task, "train", round(n_pictures * part.share / total), size) for part in parts]
    held_out = _pictures(parts[0].task, "val", N_HELD_OUT, size)
    report = train_tokenizer(np.concatenate(pictures), TokenizerTraining(**block), output, held_out)
    return asdict(report)


def _pictures(task: str, split: str, n: int, size: int) -> Pictures:
    """`n` pictures evenly spaced over a split, (n, size, size, 3)."""
    module = presets.task_module(task)
    ids = module.images(split)
    chosen = np.linspace(0, len(ids) - 1, min(n, len(ids))).astype(int)
    return stack_pictures((module.picture(ids[number]) for number in chosen), size)
