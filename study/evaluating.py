"""Evaluating many models of one frozen tower: its features of the test pictures are computed once and shared.

Source:  ours.
Differs: features pass through the bfloat16 of the cache, as in training; `htc-vlm eval` computes them anew in float32.

A task's questions are loaded once per process, its pictures' features once per machine, its blind baselines once for
all. Questions are asked by eval/run.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from htc_vlm.eval.answers import require_all
from htc_vlm.eval.run import ask_items, load_items
from htc_vlm.eval.task import HasBaselines, Item, make_task
from htc_vlm.model.answering import Answerer, AskLike
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.tiny.features import FeatureCache, fill, load_picture, meta_for
from htc_vlm.train.packed_data import code_key
from study import answers


@dataclass(frozen=True, eq=False)
class TaskSet:
    """The questions that a study asks of one task. images: keys in order of first appearance."""

    name: str
    task: str
    split: str
    items: tuple[Item, ...]
    sha256: str

    @property
    def images(self) -> list[str]:
        return list(dict.fromkeys(item.image for item in self.items))


@lru_cache(maxsize=16)
def task_set(name: str, task_name: str, split: str | None, limit: int | None, root: str) -> TaskSet:
    """The first `limit` questions of a task's split. ValueError for a task or split that is not there."""
    task = make_task(task_name)
    chosen = task.splits[0] if split is None else split
    if limit is not None and limit < 1:
        raise ValueError(f"task {name}: limit is {limit}; give at least 1, or leave it out")
    items = tuple(load_items(task, root, chosen)[:limit])
    return TaskSet(name, task_name, chosen, items, answers.questions_sha256(items, task_name))


def with_baselines(tests: TaskSet, results: Path) -> answers.QuestionSet:
    """What results/ keeps of the questions, written there if it is not yet."""
    path = answers.questions_file(results, tests.name, tests.sha256)
    if not path.is_file():
        task = make_task(tests.task)
        baselines = task.baselines(tests.items) if isinstance(task, HasBaselines) else {}
        rounded = {n: {kind: round(v, 4) for kind, v in by_kind.items()} for n, by_kind in baselines.items()}
        answers.write_questions(results, answers.question_set(tests.name, tests.items, task, rounded))
    return answers.read_questions(results, tests.name, tests.sha256)


# ------------------------------------------------------------------------------------------------ features
def picture_of(tests: TaskSet, number: int) -> Any:
    """The picture with this number."""
    return _loaders(tests)[number]()


@lru_cache(maxsize=16)
def _loaders(tests: TaskSet) -> list[Any]:
    return list({item.image: item.load for item in reversed(tests.items)}.values())[::-1]


def features_of(tests: TaskSet, tower: Any, folder: Path) -> FeatureCache:
    """The tower's patches of a test set's pictures, computed where the tower is; only what is missing."""
    key = hashlib.sha256("\n".join(tests.images).encode()).hexdigest()[:8]
    cache = FeatureCache(folder / f"{tests.task}-{tests.split}-{key}", meta_for(tower, len(tests.images)))
    if cache.missing():
        print(f"{tests.name}: the tower's features of {len(cache.missing())} pictures", flush=True)
        fill(cache, tower, partial(picture_of, tests), batch_size=32)
    return cache


@torch.no_grad()
def codes_of_tasks(tests: TaskSet, model: Any, folder: Path, batch_size: int = 64) -> np.ndarray | None:
    """(n pictures, h, w, channels) of a method with a code, from the pixels that the tower sees; None for others."""
    compressor = model.model.compressor
    if not getattr(compressor, "has_code", False):
        return None
    key = hashlib.sha256("\n".join(tests.images).encode()).hexdigest()[:8]
    file = folder / f"{tests.task}-{tests.split}-{key}-codes-{code_key(compressor)}.npy"
    if not file.exists():
        size, device, parts = model.config.vision_config.image_size, model.device, []
        for begin in range(0, len(tests.images), batch_size):
            numbers = range(begin, min(begin + batch_size, len(tests.images)))
            loaded = [load_picture(picture_of(tests, number), size).pixel_values for number in numbers]
            pixels = model.model.denormalise(torch.stack(loaded).to(device))
            parts.append(compressor.encode(pixels).half().cpu().numpy())
        partial_file = file.with_suffix(".partial.npy")
        np.save(partial_file, np.concatenate(parts))
        partial_file.replace(file)
    codes: np.ndarray = np.load(file, mmap_mode="r")
    return codes


def image_inputs(model: Any, cache: FeatureCache, codes: np.ndarray | None, numbers: Sequence[int]) -> dict[str, Tensor]:
    """patch_features (n, P, width) of these pictures, and image_codes for methods that have some."""
    out = {"patch_features": cache.get(numbers).to(model.device, model.dtype)}
    if codes is not None:
        out["image_codes"] = torch.from_numpy(codes[list(numbers)].astype(np.float32)).to(model.device)
    return out


class SharedAnswerer(Answerer):
    """Answers about the pictures of one test set, from their features; each picture is compressed once.

    n_entries: of an elastic model, how many entries a picture gets; None: all.
    """

    def __init__(
        self, model: Any, processor: Any, tests: TaskSet, cache: FeatureCache, codes: np.ndarray | None,
        n_entries: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, processor)
        self.n_entries = n_entries
        self.number = {image: i for i, image in enumerate(tests.images)}
        self.features, self.codes = cache, codes
        self.cells = self._all_cells() if model.model.compressor.n_bottleneck else None

    def inputs_of(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What the model needs of these pictures."""
        return image_inputs(self.model, self.features, self.codes, numbers)

    def _all_cells(self, batch_size: int = 64) -> CompressedImages:
        """No batch of one image: codes could not be exchanged there (anchor_source: shuffled)."""
        n_batches = max(1, len(self.number) // batch_size)
        groups = np.array_split(np.arange(len(self.number)), n_batches)
        inputs = (self.inputs_of(group.tolist()) for group in groups)
        return CompressedImages.concat([self.model.compress(**one, n_entries=self.n_entries) for one in inputs])

    def encode_asked(self, asks: Sequence[AskLike]) -> CompressedImages | Tensor:
        """As Answerer's, without loading a picture."""
        numbers = [self.number[ask.image_key] for ask in asks]
        return self.inputs_of(numbers)["patch_features"] if self.cells is None else self.cells[numbers]


# ------------------------------------------------------------------------------------------------ answers and schedule
def answer_all(answerer: Answerer, tests: TaskSet, folder: Path, batch_size: int) -> dict[str, str]:
    """{question id: answer}; asked again, only what answers.jsonl lacks."""
    path = folder / "answers.jsonl"
    found = ask_items(answerer, make_task(tests.task), tests.items, tests.items, path, batch_size)
    return require_all(found, tests.items, path)


@torch.no_grad()
def measured_schedule(model: Any, inputs: Mapping[str, Tensor]) -> list[int]:
    """Visual and bottleneck tokens of one image that entered each layer; ValueError where it is not what was promised."""
    layers, compressor = model.model.language_model.layers, model.model.compressor
    lengths = dict.fromkeys(layers, 0)  # of all passes: rows that look twice enter each layer twice

    def note(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        lengths[module] += (args[0] if args else kwargs["hidden_states"]).shape[1]

    n_patches = inputs["patch_features"].shape[1]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    n_text = 0
    try:
        if compressor.n_bottleneck:
            model.compress(**inputs, path="general")
        else:
            n_text = 1  # some methods need a word to ask with
            image = [model.config.image_token_id] * compressor.n_visual(n_patches)
            ids = torch.tensor([[*image, model.config.text_config.eos_token_id]] * len(inputs["patch_features"]))
            model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    seen, promised = [n - n_text for n in lengths.values()], compressor.schedule(n_patches, len(layers))
    if seen != promised:
        raise ValueError(f"{compressor.name} promised the schedule {promised}; the layers saw {seen}")
    return seen
