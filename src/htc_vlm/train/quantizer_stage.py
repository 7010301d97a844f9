"""The tokenizer stage of a preset: which pictures a quantizer learns from, and the preset's settings for it.

Source:  the preset's `data` and `stages.tokenizer`; the loop is train/train_quantizer.py.
Differs: from MGVQ (ImageNet): pictures of the preset's own data sets, training splits only; of conversations or a folder of
         pictures, all but those held out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from htc_vlm.data.conversations import load_conversations
from htc_vlm.data.images import ImageError, load_for_model
from htc_vlm.files import picture_files
from htc_vlm.settings import make
from htc_vlm.train import presets
from htc_vlm.train.run_record import refuse_foreign
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
    training = make(TokenizerTraining, block, what="stage setting", also_known=presets.TOKENIZER_KEYS)
    refuse_foreign(output)
    parts = [presets.DataPart(**options) for options in preset["data"]]
    total = sum(part.share for part in parts)
    split = [_train_and_held_out(part, round(n_pictures * part.share / total), size) for part in parts]
    report = train_tokenizer(np.concatenate([train for train, _ in split]), training, output, split[0][1])
    return asdict(report)


def _train_and_held_out(part: presets.DataPart, n: int, size: int) -> tuple[Pictures, Pictures]:
    """About n pictures of a data set to learn from, and up to N_HELD_OUT others to measure on."""
    if part.json is None and part.image_folder is None:
        return _pictures(part.task, "train", n, size), _pictures(part.task, "val", N_HELD_OUT, size)
    files = own_pictures(part)
    n_held_out = min(N_HELD_OUT, max(1, len(files) // 10))
    chosen = _evenly(len(files), min(n + n_held_out, len(files)))
    held = {chosen[i] for i in _evenly(len(chosen), n_held_out)}
    print(f"{part.task}: {len(chosen) - len(held)} of {len(files)} pictures to learn from, {len(held)} held out", flush=True)
    return _read([files[i] for i in chosen if i not in held], size), _read([files[i] for i in chosen if i in held], size)


def own_pictures(part: presets.DataPart) -> list[Path]:
    """The picture files of conversations (`json`), or of a folder and its subfolders (`image_folder` alone).

    ValueError with fewer than two: one is held out.
    """
    if part.json is not None:
        records = load_conversations(part.json, part.image_folder)
        files = sorted({image for record in records for image in record.images})
    else:
        folder = Path(part.image_folder or "")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of pictures ({part.task})")
        files = picture_files([folder])[0]
    if len(files) < 2:
        raise ValueError(f"{part.task}: {len(files)} pictures in {part.json or part.image_folder}; at least 2 are needed")
    return files


def _read(files: list[Path], size: int) -> Pictures:
    """Squeezed to squares; ValueError lists all that cannot be read."""
    broken: list[str] = []

    def good() -> Iterator[Image.Image]:
        for file in files:
            try:
                yield load_for_model(file)
            except ImageError as error:
                broken.append(str(error))

    pictures = [stack_pictures([picture], size) for picture in good()]
    if broken:
        raise ValueError(f"{len(broken)} of {len(files)} pictures cannot be used; remove them: {'; '.join(broken)}")
    return np.concatenate(pictures)


def _evenly(n: int, n_chosen: int) -> list[int]:
    """n_chosen of the numbers below n, evenly spaced.

    >>> _evenly(10, 3)
    [0, 4, 9]
    """
    return [int(number) for number in np.linspace(0, n - 1, n_chosen)]


def _pictures(task: str, split: str, n: int, size: int) -> Pictures:
    """`n` pictures evenly spaced over a split, (n, size, size, 3)."""
    module = presets.task_module(task)
    ids = module.images(split)
    return stack_pictures((module.picture(ids[number]) for number in _evenly(len(ids), min(n, len(ids)))), size)
