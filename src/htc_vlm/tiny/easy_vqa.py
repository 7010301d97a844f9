"""easy-VQA: one coloured shape per picture, questions and splits by others.

Source:  PyPI package easy-vqa 1.0 (MIT, Victor Zhou 2020); its official train and test splits.
Differs: `val` is the tenth of the training images whose number ends in 0; words are written as `questions.words` does.

Published on the test split: 93.8 % (the author's small Keras model, README of easy-VQA-keras). Blind, measured on the files:
always "yes" 37.3 %, best answer per question text 67.0 % (yes/no alone 82.5 %, open questions alone 23.3 %).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from htc_vlm.tiny.questions import Question, words

OFFICIAL = {"train": "train", "val": "train", "test": "test"}


def folder() -> Path:
    """Where the package's `data` folder lies: $HTC_VLM_DATA/easy-vqa/easy_vqa/data, or the installed package."""
    root = os.environ.get("HTC_VLM_DATA")
    candidates = [Path(root) / "easy-vqa" / "easy_vqa" / "data"] if root else []
    spec = importlib.util.find_spec("easy_vqa")
    if spec is not None and spec.origin:
        candidates.append(Path(spec.origin).parent / "data")
    for candidate in candidates:
        if (candidate / "answers.txt").is_file():
            return candidate
    raise FileNotFoundError(
        "easy-vqa is not here: `pip install easy-vqa==1.0`, or unpack that wheel into DIR/easy-vqa and give DIR with --data "
        f"(or HTC_VLM_DATA). Looked in: {', '.join(map(str, candidates)) or 'no folder given'}"
    )


@lru_cache(maxsize=2)
def _official(split: str) -> tuple[tuple[str, str, int], ...]:
    """(question, answer, image number) of an official split, in its order."""
    file = folder() / split / "questions.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return tuple((words(text), words(answer), int(image)) for text, answer, image in rows)
    except (json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"{file}: not the official list of [question, answer, image number] ({error})") from error


def _in_split(split: str, image: int) -> bool:
    return split == "test" or (image % 10 == 0) == (split == "val")


@lru_cache(maxsize=3)
def images(split: str) -> Sequence[str]:
    """Image ids like "train/17"; of `train`, all 4,000 official images first those that are not `val`."""
    if split not in OFFICIAL:
        raise ValueError(f"no split {split!r}; known: {', '.join(OFFICIAL)}")
    numbers = sorted({image for _, _, image in _official(OFFICIAL[split])})
    return [f"{OFFICIAL[split]}/{number}" for number in numbers if _in_split(split, number)]


def picture(image_id: str) -> Image.Image:
    """64 x 64 RGB"""
    split, _, number = image_id.partition("/")
    with Image.open(folder() / split / "images" / f"{number}.png") as image:
        return image.convert("RGB")


@lru_cache(maxsize=2)
def _by_image(split: str) -> Mapping[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for text, answer, number in _official(split):
        found.setdefault(f"{split}/{number}", []).append((text, answer))
    return found


def _kind(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "open"


def questions(split: str) -> list[Question]:
    """The official questions of a split."""
    wanted = set(images(split))
    numbered = enumerate(_official(OFFICIAL[split]))
    return [
        Question(f"easy-vqa/{OFFICIAL[split]}/{i}", f"{OFFICIAL[split]}/{number}", text, answer, _kind(answer))
        for i, (text, answer, number) in numbered
        if f"{OFFICIAL[split]}/{number}" in wanted
    ]


def sample_questions(image_id: str, n: int, seed: int) -> list[Question]:
    """n of the image's official questions in random order (all of them, if there are fewer)."""
    rows = _by_image(image_id.partition("/")[0])[image_id]
    order = np.random.default_rng(seed).permutation(len(rows))[:n]
    chosen = [rows[i] for i in order]
    return [Question(f"easy-vqa/{image_id}/{seed}.{i}", image_id, t, a, _kind(a)) for i, (t, a) in enumerate(chosen)]


def vocabulary() -> list[str]:
    """Every word of the training questions and answers (the test split has no other)."""
    return sorted({word for text, answer, _ in _official("train") for word in [*text.split(), answer]})
