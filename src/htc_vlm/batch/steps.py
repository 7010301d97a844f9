"""The two steps of a batch run, as callables from a dict of columns to a dict of columns. No engine is known here.

Source:  the map_batches convention of Ray Data and Hugging Face datasets.
Differs: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from htc_vlm import compressors
from htc_vlm.batch.sources import Ref
from htc_vlm.data.images import DEFAULT_MAX_PIXELS, ImageError, from_bytes
from htc_vlm.model.answering import Answerer
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.loading import find, load, load_processor, to_device
from htc_vlm.store import ImageStore

Columns = dict[str, Any]
ASK_AT_ONCE = 64  # rows of one generate
ROW = ("path", "id", "number", "question", "answer", "error")


@dataclass(frozen=True)
class Settings:
    """What both steps need, in whichever process they run. store: where images are looked for, and kept."""

    model: str
    store: str
    dtype: str = "model"
    maps: bool = False
    max_new_tokens: int = 16
    device: str = "cpu"


class Decode:
    """Columns of `Ref` -> path, id, asked, error, has_pixels and pixels (n, 3, height, width) float32.

    Broken pictures come with their error; those that the store has are not decoded.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._made: tuple[Any, ImageStore, tuple[int, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_made": None}  # a processor and a store are opened where the work is done

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> Columns:
        processor, store, shape = self._tools()
        refs = [Ref(*(batch[key][i] for key in ("name", "kind", "path", "at", "size"))) for i in range(len(batch["name"]))]
        found = [_content(ref) for ref in refs]
        ids = [hashlib.sha256(content).digest() if content is not None else b"" for content, _ in found]
        there = store.intact([id.hex() for id in ids if id])
        pictures: list[Image.Image | None] = []
        errors = []
        for ref, id, (content, error) in zip(refs, ids, found, strict=True):
            picture = None
            if content is not None and id.hex() not in there:
                picture, error = _picture(content, ref.name)
            pictures.append(picture)
            errors.append(error)
        good = [picture for picture in pictures if picture is not None]
        has_pixels = np.array([picture is not None for picture in pictures])
        spread = np.zeros((len(refs), *shape), np.float32)
        if good:
            spread[has_pixels] = processor(images=good, return_tensors="np")["pixel_values"]
        return {
            "path": np.array([ref.name for ref in refs], dtype=object),
            "id": np.array([id.hex() for id in ids], dtype=object),
            "asked": np.array(list(batch["asked"]), dtype=object),
            "error": np.array(errors, dtype=object),
            "has_pixels": has_pixels,
            "pixels": spread,
        }

    def _tools(self) -> tuple[Any, ImageStore, tuple[int, ...]]:
        """The processor, the store, and the shape of one picture's pixels."""
        if self._made is None:
            folder = find(self.settings.model)
            processor = load_processor(folder, HtcVlmConfig.from_pretrained(folder))
            shape = np.asarray(processor(images=[Image.new("RGB", (8, 8))], return_tensors="np")["pixel_values"]).shape[1:]
            self._made = processor, ImageStore.open(self.settings.store, read_only=True), shape
        return self._made


def _content(ref: Ref) -> tuple[bytes | None, str]:
    try:
        return ref.read(), ""
    except (OSError, ValueError) as error:
        return None, " ".join(str(error).split())


def _picture(content: bytes, name: str) -> tuple[Image.Image | None, str]:
    try:
        picture = from_bytes(content, name)
        if max(picture.size) ** 2 > DEFAULT_MAX_PIXELS:
            raise ImageError(f"{name}: {picture.width} x {picture.height} pixels are too many when padded to a square; crop it")
        return picture, ""
    except (ImageError, OSError, ValueError) as error:
        return None, " ".join(str(error).split())


class CompressAndAsk:
    """What `Decode` gives -> one row for each picture and question: path, id, number, question, answer, error.

    Each image is in the store before its answers are given; they come from what is stored, so that they are the answers that
    the store gives later.
    """

    def __init__(self, settings: Settings, open_store: Callable[[Any, Any], ImageStore] | None = None) -> None:
        model, processor = load(settings.model)
        model = to_device(model, settings.device)
        self.settings, self.answerer = settings, Answerer(model, processor)
        opened = open_store or (lambda m, p: ImageStore.open(settings.store, m, p, settings.dtype, maps=settings.maps))
        self.store = opened(model, processor)

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        self._keep(batch)
        good = [i for i, error in enumerate(batch["error"]) if not error]
        unique = list(dict.fromkeys(str(batch["id"][i]) for i in good))
        images = self._images(unique)
        asked = [json.loads(str(one)) for one in batch["asked"]]
        pairs = [(i, question) for i in good for question in asked[i]]
        which = [unique.index(str(batch["id"][i])) for i, _ in pairs]
        answers: list[str] = []
        for start in range(0, len(pairs), ASK_AT_ONCE):
            part = slice(start, start + ASK_AT_ONCE)
            texts = [question for _, question in pairs[part]]
            answers += self.answerer.ask(images, which[part], texts, self.settings.max_new_tokens)
        given = iter(answers)
        rows: list[tuple[Any, ...]] = []
        for i, error in enumerate(batch["error"]):
            for number, question in enumerate(asked[i]):
                answer = "" if error else next(given)
                rows.append((batch["path"][i], batch["id"][i], number, question, answer, error))
        columns = zip(*rows, strict=True) if rows else ([] for _ in ROW)
        kinds = {"number": np.int64}
        return {name: np.array(list(column), dtype=kinds.get(name, object)) for name, column in zip(ROW, columns, strict=True)}

    def _keep(self, batch: Mapping[str, Any]) -> None:
        """Compress what has pixels and put it in the store, with the names of all."""
        import torch

        first = {str(batch["id"][i]): i for i in reversed(np.flatnonzero(batch["has_pixels"]))}
        if first:
            model = self.answerer.model
            pixels = torch.from_numpy(np.asarray(batch["pixels"])[list(first.values())]).to(model.device, model.dtype)
            images = model.compress(
                pixel_values=pixels, maps=self.settings.maps, image_processor=self.answerer.processor.image_processor
            )
            self.store.put(list(first), images)
        self._name([(str(batch["path"][i]), str(batch["id"][i])) for i, error in enumerate(batch["error"]) if not error])

    def _name(self, named: list[tuple[str, str]]) -> None:
        self.store.name(named)

    def _images(self, ids: list[str]) -> Any:
        return self.store.get(ids) if ids else None


def columns_of(refs: Sequence[Ref], asked: Sequence[Sequence[str]]) -> Columns:
    """Refs and their questions as columns; lists of questions as JSON, which every engine can carry."""
    keys = ("name", "kind", "at", "size")
    columns: Columns = {key: [getattr(ref, key) for ref in refs] for key in keys}
    return {**columns, "path": [os.path.abspath(ref.path) for ref in refs], "asked": [json.dumps(list(one)) for one in asked]}


def is_ready(model: str) -> Path:
    """The checkpoint's folder. ValueError, before anything is loaded, for one whose images cannot be kept."""
    folder = find(model)
    config = HtcVlmConfig.from_pretrained(folder)
    if not compressors.build(**config.compressor).n_bottleneck:
        raise ValueError(f"model {model!r} has no bottleneck, so it keeps no compressed pictures; use e.g. tiny")
    return folder
