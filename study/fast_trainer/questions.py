"""The questions that may be asked about each picture, drawn once and kept; and which of them are asked at a step.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from htc_vlm.train import presets
from study.fast_trainer.tree import Asked

YES_NO = ("yes", "no")
# Of pictograms: more of what has many different questions. How often each kind is asked is decided at each step.
POOL_WEIGHTS = {
    "name": 1, "category": 1, "tile": 2, "background": 0.5, "size": 2, "turn": 2, "count": 1.5, "on": 1, "where": 2,
    "exist": 3, "beside": 2,
}  # fmt: skip
N_DRAWN, N_DRAWS = 48, 2  # questions of a picture at once, and how often: other "no" questions each time


class Pool:
    """All questions of some pictures, as tokens: rows `first[i]` to `first[i + 1]` are those of picture i."""

    def __init__(self, arrays: Mapping[str, np.ndarray], kinds: Sequence[str], yes_no: tuple[int, int]) -> None:
        self.tokens, self.length = arrays["tokens"], arrays["length"]
        self.answer, self.kind, self.first = arrays["answer"], arrays["kind"], arrays["first"]
        self.kinds, self.yes_no = tuple(kinds), yes_no

    def __len__(self) -> int:
        return len(self.first) - 1

    def rows(self, picture: int) -> np.ndarray:
        """Numbers of a picture's questions."""
        return np.arange(self.first[picture], self.first[picture + 1])

    def asked(self, rows: Sequence[int]) -> list[Asked]:
        """Questions by number."""
        return [
            Asked(tuple(self.tokens[row, : self.length[row]].tolist()), int(self.answer[row]), self.kinds[self.kind[row]])
            for row in rows
        ]

    def draw(self, picture: int, weights: Mapping[str, float] | None, rng: np.random.Generator) -> list[Asked]:
        """A picture's questions in random order, those of heavy kinds first (weights None: all alike), as many answered yes as
        no. A kind's weight is shared by its questions."""
        rows = paired(self.rows(picture), self.answer, self.kind, self.yes_no, rng)
        kind = self.kind[rows]
        of_kind = np.array([1.0 if weights is None else weights.get(name, 0.0) for name in self.kinds])
        share = of_kind[kind] / np.bincount(kind, minlength=len(self.kinds))[kind]
        wait = rng.exponential(size=len(rows)) / np.maximum(share, 1e-9)
        return self.asked(rows[np.argsort(wait)])


def paired(
    rows: np.ndarray, answer: np.ndarray, kind: np.ndarray, yes_no: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """The rows without some drawn at random, so that each kind that is answered yes or no has as many of both.

    Of a picture there are few things to say yes to and a hundred to say no to: asked as they come, four of five are "no",
    and that is what a model learns to say (LOG.md).
    """
    surplus = []
    for one in np.unique(kind[rows]):
        yes, no = (rows[(kind[rows] == one) & (answer[rows] == word)] for word in yes_no)
        if len(yes) + len(no) == (kind[rows] == one).sum():
            more, n_surplus = (yes, len(yes) - len(no)) if len(yes) > len(no) else (no, len(no) - len(yes))
            surplus.append(rng.choice(more, n_surplus, replace=False))
    return rows if not surplus else np.setdiff1d(rows, np.concatenate(surplus))


def questions_of(task: str, image_id: str) -> list[Any]:
    """Every different question that N_DRAWS draws give for a training picture."""
    module = presets.task_module(task)
    extra = {"weights": POOL_WEIGHTS} if task == "pictograms" else {}
    found: dict[str, Any] = {}
    for seed in range(1, N_DRAWS + 1):
        for question in module.sample_questions(image_id, N_DRAWN, seed, **extra):
            found.setdefault(question.text, question)
    return list(found.values())


def fixed_questions(task: str, split: str, ids: Sequence[str]) -> list[list[Any]]:
    """The fixed questions of a split about these pictures."""
    by_image: dict[str, list[Any]] = {image: [] for image in ids}
    for question in presets.task_module(task).questions(split):
        if question.image in by_image:
            by_image[question.image].append(question)
    return list(by_image.values())


def encode(by_picture: Sequence[Sequence[Any]], tokenizer: Any) -> Pool:
    """Questions -> a pool. ValueError for an answer that is more than one token."""
    tokens_of = lru_cache(maxsize=None)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
    flat = [question for questions in by_picture for question in questions]
    kinds = sorted({question.kind for question in flat})
    answers = [tokens_of(question.answer) for question in flat]
    long = [question for question, answer in zip(flat, answers, strict=True) if len(answer) != 1]
    if long:
        raise ValueError(f"{long[0].id}: the answer {long[0].answer!r} is more than one token; use htc-vlm train")
    texts = [tokens_of(question.text) for question in flat]
    tokens = np.zeros((len(flat), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    arrays = {
        "tokens": tokens,
        "length": np.array([len(text) for text in texts], np.int32),
        "answer": np.array([answer[0] for answer in answers], np.int32),
        "kind": np.array([kinds.index(question.kind) for question in flat], np.int64),
        "first": np.cumsum([0, *(len(questions) for questions in by_picture)]),
    }
    return Pool(arrays, kinds, yes_no_of(tokenizer))


def yes_no_of(tokenizer: Any) -> tuple[int, int]:
    """Ids of the two words."""
    yes, no = tokenizer.convert_tokens_to_ids(list(YES_NO))
    return int(yes), int(no)


def training_pool(task: str, ids: Sequence[str], tokenizer: Any, folder: Path) -> Pool:
    """The pool of training pictures, drawn and written into `folder` unless it is there."""
    rule = [task, len(ids), N_DRAWN, N_DRAWS, POOL_WEIGHTS, sorted(tokenizer.get_vocab().items())]
    key = hashlib.sha256(json.dumps(rule).encode()).hexdigest()[:12]
    file = folder / f"{task}-train-{len(ids)}-questions-{key}.npz"
    if not file.is_file():
        print(f"{task}: drawing the questions about {len(ids)} pictures", flush=True)
        made = encode([questions_of(task, image_id) for image_id in ids], tokenizer)
        partial = file.with_suffix(".partial.npz")
        folder.mkdir(parents=True, exist_ok=True)
        names = ("tokens", "length", "answer", "kind", "first")
        np.savez(partial, kinds=np.array(made.kinds), **{name: getattr(made, name) for name in names})
        partial.replace(file)
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in kept.files}
    return Pool(arrays, [str(kind) for kind in arrays.pop("kinds")], yes_no_of(tokenizer))
