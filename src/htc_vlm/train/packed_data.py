"""The toy world's training data: each task's pictures as cached features (and codes), asked by its curriculum.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from htc_vlm.tiny.align_patches import align_words, name_table, told_by_head
from htc_vlm.tiny.features import FeatureCache, fill, meta_for
from htc_vlm.tiny.packed import Source, codes_of
from htc_vlm.tiny.tower import imagenet_head
from htc_vlm.train import presets

CODE_PICTURE_SIZE = 160


def packed_length(preset: dict[str, Any], processor: Any) -> int:
    """One fixed length for all batches, so that a compiled layer is compiled once."""
    n_image = len(processor.tokenizer.encode(processor.image_text(), add_special_tokens=False))
    return n_image + int(preset["n_text"])


def open_sources(
    preset: dict[str, Any], model: Any, folder: Path, curricula: dict[str, list[dict[str, Any]]], split: str = "train"
) -> list[Source]:
    """Open or fill the feature caches of a preset's tasks."""
    tower, compressor = model.model.vision_tower, model.model.compressor
    sources = []
    for options in preset["data"]:
        part = presets.DataPart(**options)
        curriculum = curricula.get(part.task, part.curriculum)
        module = presets.task_module(part.task)
        if part.images < 1:
            raise ValueError(f"{part.task}: empty data set: `images` is {part.images}; say how many to train on")
        ids = module.images(split)[: part.images]
        if len(ids) < part.images:
            name = "training split" if split == "train" else f"split {split!r}"
            raise ValueError(f"{part.task}: {part.images} images asked for, the {name} has {len(ids)}")
        name, stem = cache_names(part.task, split, part.images)
        cache = FeatureCache(folder / name, meta_for(tower, part.images, CODE_PICTURE_SIZE))
        if cache.missing() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{part.task}: the tower's features are not all in {folder} yet, and several processes would write over one "
                "another; run the command without torchrun first, for one step (--set stages.STAGE.steps=1, other --output)"
            )
        if cache.missing():
            print(
                f"{part.task}: computing the tower's features of {len(cache.missing())} images (resumable)", flush=True
            )
            fill(cache, tower, partial(_picture, module, ids))
        codes = None
        if getattr(compressor, "has_code", False):
            codes = codes_of(cache, partial(_encode, model), folder / f"{stem}-codes-{code_key(compressor)}.npy")
        ask, simple_first = _asker(module, ids, curriculum), _simple_first(module, ids, curriculum)
        sources.append(Source(part.task, cache, ask, part.share, codes, simple_first))
    return sources


def cache_names(task: str, split: str, n_images: int) -> tuple[str, str]:
    """What the features and the codes of a split's first pictures are called. A set whose pictures depend on other files says
    so by its `version`."""
    module = presets.task_module(task)
    made_of = f"{task}-{module.version()}" if hasattr(module, "version") else task
    if split == "train":  # of any number: more pictures go on
        return f"{made_of}-train", made_of
    return f"{made_of}-{split}-{n_images}", f"{made_of}-{split}-{n_images}"


def held_out_sources(
    preset: dict[str, Any], model: Any, folder: Path, block: dict[str, Any], n_pictures: int
) -> list[Source]:
    """Pictures of the validation splits, asked about as in the last block of each curriculum."""
    curricula = block.get("curriculum", {})
    parts, last = [], {}
    for options in preset["data"]:
        part = presets.DataPart(**options)
        blocks = curricula.get(part.task, part.curriculum)
        last[part.task] = [{k: v for k, v in blocks[-1].items() if k != "max_things"}] if blocks else []
        n = min(n_pictures, len(presets.task_module(part.task).images("val")))
        parts.append({"task": part.task, "share": part.share, "images": n})
    return open_sources({**preset, "data": parts}, model, folder, last, split="val")


def align_patches(preset: dict[str, Any], model: Any, tokenizer: Any, sources: list[Source], seed: int) -> None:
    """The preset's `words` block, on the cached features of its task."""
    settings = presets.word_settings(preset["words"])
    source = next((source for source in sources if source.name == settings.task), None)
    module = presets.task_module(settings.task)
    if source is None or not hasattr(module, "patch_words"):
        able = [part["task"] for part in preset["data"] if hasattr(presets.task_module(part["task"]), "patch_words")]
        raise ValueError(f"words.task is {settings.task!r}; tasks in this preset that know a patch's words: {', '.join(able)}")
    ids, n_side = module.images("train"), round(source.cache.meta.n_patches**0.5)
    words = [module.patch_words(image_id, n_side) for image_id in ids[: len(source.cache)]]
    vocabulary, table, told = tokenizer.get_vocab(), None, None
    if settings.told:
        if not hasattr(module, "some_crops"):
            raise ValueError(f"words.told is {settings.told}; {settings.task} has no photos to crop (photo has): leave it out")
        if "language_model" not in preset:
            raise ValueError("words.told needs the preset's language_model, whose words the classes' names are made of")
        told = told_by_head(model.model.vision_tower, imagenet_head(), module.some_crops(settings.told))
    if "language_model" in preset:  # pretrained: its words stay as they are, and a name may be several tokens
        names = list(module.class_names()) if told else []
        names += sorted({name for row in words for patch in row for name in patch} - set(names))
        vocabulary = {name: i for i, name in enumerate(names)}
        table = name_table(names, tokenizer, model.get_input_embeddings().weight)
    loss = align_words(model, source.cache, words.__getitem__, vocabulary, settings, seed, table, told)
    print(f"patches aligned with words: {settings.steps} steps, loss {loss:.3f} nats per word", flush=True)


def _encode(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels on the CPU -> their code on the CPU, computed where the model is."""
    code: torch.Tensor = model.model.compressor.encode(pixels.to(model.device)).cpu()
    return code


def _picture(module: Any, ids: Sequence[str], number: int) -> Any:
    return module.picture(ids[number])


def _simple_first(
    module: Any, ids: Sequence[str], curriculum: Sequence[dict[str, Any]]
) -> list[tuple[float, np.ndarray]]:
    """For the blocks of a curriculum up to the last with `max_things`: (until, numbers of the images it allows)."""
    n_blocks = max((i + 1 for i, block in enumerate(curriculum) if "max_things" in block), default=0)
    if not n_blocks:
        return []
    counts = np.array([module.n_things(image_id) for image_id in ids])
    out = [
        (float(block["until"]), np.flatnonzero(counts <= block.get("max_things", counts.max())))
        for block in curriculum[:n_blocks]
    ]
    if any(len(allowed) == 0 for _, allowed in out):
        raise ValueError("curriculum: max_things leaves no image; raise it")
    return out


def code_key(compressor: Any) -> str:
    """What codes depend on, as part of a file name: the quantizer's weights and what is taken of it."""
    digest = hashlib.sha256()
    for name, value in sorted(compressor.quantizer.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    if compressor.quantizer.name != "mgvq":  # one without weights is told from another by its settings
        digest.update(json.dumps(compressor.settings.quantizer, sort_keys=True).encode())
    kind = "latents" if compressor.settings.anchor_source == "latents" else "quantized"
    return f"{kind}-{compressor.settings.quantizer['image_size']}-{digest.hexdigest()[:12]}"


def _asker(
    module: Any, ids: Sequence[str], curriculum: Sequence[dict[str, Any]]
) -> Callable[[int, int, int, float], list[tuple[str, str]]]:
    """Questions about image number i, their kinds drawn by the weights that the curriculum has at this point of the run."""

    def ask(image: int, n: int, seed: int, progress: float) -> list[tuple[str, str]]:
        block = next((block for block in curriculum if progress < block["until"]), {})
        extra = {name: block[key] for name, key in (("weights", "kinds"), ("places", "places")) if key in block}
        return [(question.text, question.answer) for question in module.sample_questions(ids[image], n, seed, **extra)]

    return ask
