"""Pictures of a run: features of the frozen tower, codes, questions; and the batch of each step.

Source:  ours.
Differs: a batch is a pure function of (seed, step), so a run that was cut off goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htc_vlm.tiny import pictograms
from htc_vlm.tiny.features import FeatureCache, fill, meta_for
from htc_vlm.tiny.packed import codes_of
from htc_vlm.train import presets
from htc_vlm.train.packed_data import CODE_PICTURE_SIZE, cache_names, code_key
from study.fast_trainer.questions import Pool, encode, fixed_questions, training_pool
from study.fast_trainer.settings import Part, Run
from study.fast_trainer.tree import Trees, grow

NO_TURN = -1


@dataclass(frozen=True)
class Pictures:
    """One data set. codes (n, h, w, channels) or None; turns (n, 4): of the thing in each cell, NO_TURN where none turns."""

    task: str
    cache: FeatureCache
    codes: np.ndarray | None
    pool: Pool
    turns: np.ndarray | None = None

    def features(self, numbers: np.ndarray) -> Tensor:
        """(n, P, width) float32"""
        return self.cache.get(numbers.tolist()).float()

    def code(self, numbers: np.ndarray) -> Tensor:
        """(n, channels), or one zero where no code is read."""
        if self.codes is None:
            return torch.zeros(1)
        return torch.from_numpy(self.codes[numbers].astype(np.float32)).flatten(1)


@dataclass(frozen=True)
class Batch:
    """What one step sees. turns (n, 4) or None: for the second loss. is_first: of the first data set?"""

    features: Tensor
    code: Tensor
    trees: Trees
    turns: Tensor | None
    is_first: bool


def open_cache(task: str, split: str, n_images: int, model: Any, folder: Path) -> tuple[list[str], FeatureCache, Any]:
    """(image ids, features, codes) of the first pictures of a split, computed where they are missing."""
    module = presets.task_module(task)
    ids = list(module.images(split)[:n_images])
    if len(ids) < n_images or n_images < 1:
        raise ValueError(f"{task}: {n_images} images asked for, the split {split!r} has {len(module.images(split))}")
    name, stem = cache_names(task, split, n_images)
    cache = FeatureCache(folder / name, meta_for(model.model.vision_tower, n_images, CODE_PICTURE_SIZE))
    if cache.missing():
        print(f"{task}: the tower's features of {len(cache.missing())} pictures of {split} (resumable)", flush=True)
        fill(cache, model.model.vision_tower, lambda number: module.picture(ids[number]))
    compressor, codes = model.model.compressor, None
    if getattr(compressor, "has_code", False):
        codes = codes_of(cache, compressor.encode, folder / f"{stem}-codes-{code_key(compressor)}.npy")
    return ids, cache, codes


def training_pictures(run: Run, part: Part, model: Any, tokenizer: Any, folder: Path) -> Pictures:
    """One data set to train on."""
    ids, cache, codes = open_cache(part.task, "train", part.images, model, folder)
    turns = turns_of(ids) if run.turn_loss and part.task == "pictograms" else None
    return Pictures(part.task, cache, codes, training_pool(part.task, ids, tokenizer, folder), turns)


def watched_pictures(watched: dict[str, Any], model: Any, tokenizer: Any, folder: Path) -> Pictures:
    """Pictures that are not trained on, with their fixed questions."""
    task, split, n_images = watched["task"], watched["split"], watched["images"]
    ids, cache, codes = open_cache(task, split, n_images, model, folder)
    return Pictures(task, cache, codes, encode(fixed_questions(task, split, ids), tokenizer))


def turns_of(ids: Sequence[str]) -> np.ndarray:
    """(n, 4) number of the turn of the thing in each cell of a pictogram scene."""
    names = list(pictograms.TURNS)
    out = np.full((len(ids), len(pictograms.PLACES)), NO_TURN, np.int64)
    for row, image_id in enumerate(ids):
        for thing in pictograms.scene(image_id).things:
            if thing.concept.turns:
                out[row, thing.cell] = names.index(thing.turn)
    return out


def cells_of_patches(n_patches: int) -> Tensor:
    """(P,) which quarter of the picture each patch is in.

    >>> cells_of_patches(16).view(4, 4).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    """
    side = round(n_patches**0.5)
    half = torch.arange(side) * 2 // side
    return (2 * half[:, None] + half[None, :]).flatten()


def batch(run: Run, sets: Sequence[Pictures], step: int, end_id: int) -> tuple[Batch, np.random.Generator]:
    """What a step sees, and the generator for what else is drawn in it."""
    rng = np.random.default_rng((run.seed, step))
    chosen = 0
    if len(sets) > 1 and step % run.other_every == run.other_every - 1:
        chosen = 1 + step // run.other_every % (len(sets) - 1)
    pictures, part = sets[chosen], run.parts[chosen]
    numbers = rng.choice(len(pictures.cache), min(part.images_per_step, len(pictures.cache)), replace=False)
    weights = run.kinds_at(step) if chosen == 0 else None
    questions = [pictures.pool.draw(int(number), weights, rng) for number in numbers]
    trees = grow(questions, part.n_text, part.n_answers, end_id, run.end_every)
    turns = None if pictures.turns is None else torch.from_numpy(pictures.turns[numbers])
    return Batch(pictures.features(numbers), pictures.code(numbers), trees, turns, chosen == 0), rng
