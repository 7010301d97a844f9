"""Fashion-MNIST asked as questions: small grey photos of clothes, ten classes.

Source:  Xiao et al. 2017, arXiv:1708.07747, as in Debian's dataset-fashion-mnist (MIT): the official 60,000 / 10,000 split.
Differs: asked as questions; class names are single words (NAMES). `val` is the last 5,000 training images.

Published (the data set's own table): human 83.5 %, two-layer CNN 87.6 to 92.5 %, WRN-28-10 96.3 %. Blind: 10 %.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from htc_vlm.tiny.questions import Question

# T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot: the official classes 0 to 9
NAMES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
OPEN = "what item of clothing is this ?"
FILES = {"train": "train", "val": "train", "test": "t10k"}
N_VAL = 5000
SYSTEM = Path("/usr/share/datasets/fashion-mnist")


def folder() -> Path:
    """$HTC_VLM_DATA/fashion-mnist, or where Debian's package puts it."""
    root = os.environ.get("HTC_VLM_DATA")
    candidates = ([Path(root) / "fashion-mnist"] if root else []) + [SYSTEM]
    for candidate in candidates:
        found = sorted(candidate.rglob("t10k-images-idx3-ubyte.gz")) if candidate.is_dir() else []
        if found:
            return found[0].parent
    raise FileNotFoundError(
        "fashion-mnist is not here: install Debian's package dataset-fashion-mnist, or put the four official *-ubyte.gz files "
        f"into DIR/fashion-mnist and give DIR with --data (or HTC_VLM_DATA). Looked in: {', '.join(map(str, candidates))}"
    )


def _read(name: str, magic: int, n_header: int) -> np.ndarray:
    """An idx file's bytes after its header. ValueError when it is damaged."""
    file = folder() / name
    try:
        with gzip.open(file) as opened:
            raw = opened.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({error}); fetch it again") from error
    if int.from_bytes(raw[:4], "big") != magic:
        raise ValueError(f"{file}: not an official idx file (its first four bytes are {raw[:4]!r})")
    return np.frombuffer(raw, np.uint8, offset=n_header)


@lru_cache(maxsize=2)
def _official(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 28, 28) and labels (n,) of an official file pair."""
    pictures = _read(f"{file}-images-idx3-ubyte.gz", 2051, 16).reshape(-1, 28, 28)
    labels = _read(f"{file}-labels-idx1-ubyte.gz", 2049, 8)
    if len(pictures) != len(labels):
        raise ValueError(f"{file}: {len(pictures)} pictures and {len(labels)} labels; fetch the files again")
    return pictures, labels


@lru_cache(maxsize=3)
def images(split: str) -> Sequence[str]:
    """Image ids like "train/17", numbers in the official order."""
    if split not in FILES:
        raise ValueError(f"no split {split!r}; known: {', '.join(FILES)}")
    n = len(_official(FILES[split])[1])
    numbers = range(n) if split == "test" else range(n - N_VAL) if split == "train" else range(n - N_VAL, n)
    return [f"{FILES[split]}/{number}" for number in numbers]


def picture(image_id: str) -> Image.Image:
    """28 x 28, grey as RGB"""
    file, _, number = image_id.partition("/")
    return Image.fromarray(_official(file)[0][int(number)]).convert("RGB")


def _name(image_id: str) -> str:
    file, _, number = image_id.partition("/")
    return NAMES[int(_official(file)[1][int(number)])]


def _yes_no(name: str, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return f"is this a {name} ?", "yes"
    others = [other for other in NAMES if other != name]
    return f"is this a {others[int(rng.integers(len(others)))]} ?", "no"


def questions(split: str) -> list[Question]:
    """For each image the open question, then one balanced yes/no question."""
    out = []
    for number, image_id in enumerate(images(split)):
        name = _name(image_id)
        text, answer = _yes_no(name, np.random.default_rng((7, number)))
        out.append(Question(f"fashion-mnist/{image_id}/open", image_id, OPEN, name, "open"))
        out.append(Question(f"fashion-mnist/{image_id}/yes-no", image_id, text, answer, "yes/no"))
    return out


def sample_questions(image_id: str, n: int, seed: int) -> list[Question]:
    """The open question, then n - 1 yes/no questions, each drawn on its own: the one text answered yes comes again."""
    rng = np.random.default_rng(seed)
    name = _name(image_id)
    rows = [(OPEN, name, "open"), *((*_yes_no(name, rng), "yes/no") for _ in range(n - 1))]
    return [Question(f"fashion-mnist/{image_id}/{seed}.{i}", image_id, *row) for i, row in enumerate(rows)]


def vocabulary() -> list[str]:
    return sorted({"is", "a", "yes", "no", *OPEN.split(), *NAMES})
