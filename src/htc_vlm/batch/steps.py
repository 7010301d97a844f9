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
from htc_vlm.model.add_compressor import LLAVA_TYPES
from htc_vlm.model.answering import Answerer
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.loading import find, load, load_processor, model_type, to_device
from htc_vlm.model.prefix_cache import own_bottleneck
from htc_vlm.model.stock_answering import StockAnswerer
from htc_vlm.store import ImageStore
from htc_vlm.store.about import check_levels

Columns = dict[str, Any]
ASK_AT_ONCE = 64  # rows of one generate
ROW = ("path", "id", "number", "question", "answer", "error")


@dataclass(frozen=True)
class Settings:
    """What both steps need, in whichever process they run.

    store: where images are looked for, and kept. method: of a model without a bottleneck, see `ImageStore.open`; None with
    one that is there: the store's.
    """

    model: str
    store: str
    dtype: str = "model"
    maps: bool = False
    max_new_tokens: int = 16
    device: str = "cpu"
    method: Mapping[str, Any] | None = None


class Decode:
    """Columns of `Ref` -> path, id, asked, error, is_new and pixels (n, 3, height, width) float32.

    Broken pictures come with their error; those that the store has are not decoded. Of a model that is no LLaVA with a
    bottleneck, whose processor makes of each picture what it likes, `content` are the files as they are, instead of pixels.
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
        about = {
            "path": np.array([ref.name for ref in refs], dtype=object),
            "id": np.array([id.hex() for id in ids], dtype=object),
            "asked": np.array(list(batch["asked"]), dtype=object),
        }
        if processor is None:
            files = [content if id.hex() not in there else None for id, (content, _) in zip(ids, found, strict=True)]
            return {
                **about,
                "error": np.array([error for _, error in found], dtype=object),
                "is_new": np.array([file is not None for file in files]),
                "content": np.array([file or b"" for file in files], dtype=object),
            }
        pictures: list[Image.Image | None] = []
        errors = []
        for ref, id, (content, error) in zip(refs, ids, found, strict=True):
            picture = None
            if content is not None and id.hex() not in there:
                picture, error = _picture(content, ref.name)
            pictures.append(picture)
            errors.append(error)
        good = [picture for picture in pictures if picture is not None]
        is_new = np.array([picture is not None for picture in pictures])
        spread = np.zeros((len(refs), *shape), np.float32)
        if good:
            spread[is_new] = processor(images=good, return_tensors="np")["pixel_values"]
        return {**about, "error": np.array(errors, dtype=object), "is_new": is_new, "pixels": spread}

    def _tools(self) -> tuple[Any, ImageStore, tuple[int, ...]]:
        """The processor (None: pictures are carried as files), the store, and the shape of one picture's pixels."""
        if self._made is None:
            folder, store = find(self.settings.model), ImageStore.open(self.settings.store, read_only=True)
            if not carries_pixels(folder):
                self._made = None, store, ()
                return self._made
            processor = load_processor(folder, HtcVlmConfig.from_pretrained(folder))
            shape = np.asarray(processor(images=[Image.new("RGB", (8, 8))], return_tensors="np")["pixel_values"]).shape[1:]
            self._made = processor, store, shape
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
        self.settings, self.is_stock = settings, not own_bottleneck(model)
        self.answerer: Answerer | StockAnswerer = (StockAnswerer if self.is_stock else Answerer)(model, processor)
        opened = open_store or (lambda m, p: store_of(settings, m, p))
        self.store = opened(model, processor)

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        errors = self._keep(batch)
        good = [i for i, error in enumerate(errors) if not error]
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
        for i, error in enumerate(errors):
            for number, question in enumerate(asked[i]):
                answer = "" if error else next(given)
                rows.append((batch["path"][i], batch["id"][i], number, question, answer, error))
        columns = zip(*rows, strict=True) if rows else ([] for _ in ROW)
        kinds = {"number": np.int64}
        return {name: np.array(list(column), dtype=kinds.get(name, object)) for name, column in zip(ROW, columns, strict=True)}

    def _keep(self, batch: Mapping[str, Any]) -> list[str]:
        """Compress what is new and put it in the store, with the names of all. Each row's error."""
        errors = [str(error) for error in batch["error"]]
        first = {str(batch["id"][i]): int(i) for i in reversed(np.flatnonzero(batch["is_new"]))}
        if first and "content" in batch:
            broken = self._keep_files(batch, first)
            errors = [error or broken.get(str(id), "") for error, id in zip(errors, batch["id"], strict=True)]
        elif first:
            import torch

            model: Any = self.answerer.model
            pixels = torch.from_numpy(np.asarray(batch["pixels"])[list(first.values())]).to(model.device, model.dtype)
            images = model.compress(
                pixel_values=pixels, maps=self.settings.maps, image_processor=self.answerer.processor.image_processor
            )
            self.store.put(list(first), images)
        self._name([(str(batch["path"][i]), str(batch["id"][i])) for i, error in enumerate(errors) if not error])
        return errors

    def _keep_files(self, batch: Mapping[str, Any], first: Mapping[str, int]) -> dict[str, str]:
        """id -> why its picture cannot be kept. One at a time: pictures of other sizes may have other counts of entries."""
        broken = {}
        for id, i in first.items():
            picture, broken[id] = _picture(batch["content"][i], str(batch["path"][i]))
            if picture is not None:
                try:
                    images = self.store.compress([picture])
                except ValueError as error:  # too thin for the processor, fewer tokens than the budget, ...
                    broken[id] = f"{batch['path'][i]}: {' '.join(str(error).split())}"
                else:
                    self.store.put([id], images)
        return broken

    def _name(self, named: list[tuple[str, str]]) -> None:
        self.store.name(named)

    def _images(self, ids: list[str]) -> Any:
        """What is asked: images in one tensor, or one by one of a stock model."""
        if self.is_stock:
            return [self.store.get([id]) for id in ids]
        return self.store.get(ids) if ids else None


def columns_of(refs: Sequence[Ref], asked: Sequence[Sequence[str]]) -> Columns:
    """Refs and their questions as columns; lists of questions as JSON, which every engine can carry."""
    keys = ("name", "kind", "at", "size")
    columns: Columns = {key: [getattr(ref, key) for ref in refs] for key in keys}
    return {**columns, "path": [os.path.abspath(ref.path) for ref in refs], "asked": [json.dumps(list(one)) for one in asked]}


def store_of(settings: Settings, model: Any, processor: Any) -> ImageStore:
    """The run's store, to be written to."""
    check_levels(settings.store, settings.dtype)
    return ImageStore.open(settings.store, model, processor, settings.dtype, method=settings.method, maps=settings.maps)


def carries_pixels(folder: Path) -> bool:
    """Is it a LLaVA with a bottleneck? Then all pictures have pixels of one shape; others are carried as files."""
    if model_type(folder) not in LLAVA_TYPES:
        return False
    return bool(compressors.build(**HtcVlmConfig.from_pretrained(folder).compressor).n_bottleneck)

