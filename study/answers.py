"""What a study keeps of an evaluation: numbers, and which questions were answered right, small enough to commit.

Source:  docs/design.md; one bit a question, so that any two rows can be compared question by question.
Differs: questions, kinds, pictures and blind baselines are the same for all rows: they are kept once, in
         study/results/questions/, under the hash of the questions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htc_vlm.eval.score import plain_match
from htc_vlm.eval.task import Item, Task
from htc_vlm.files import write_json
from htc_vlm.tiny.questions import Question

QUESTIONS = "questions"  # folder beside the tables in results/


@dataclass(frozen=True)
class QuestionSet:
    """The fixed questions of one task, without their words: by number, the kind and the picture of each.

    baselines: name -> kind (or "score") -> percent.
    """

    name: str
    sha256: str
    kinds: tuple[str, ...]
    kind_of: np.ndarray  # (n,) numbers into `kinds`
    image_of: np.ndarray  # (n,) numbers of pictures
    baselines: dict[str, dict[str, float]]

    def __len__(self) -> int:
        return len(self.kind_of)

    @property
    def n_images(self) -> int:
        return len(np.unique(self.image_of))

    def of_kind(self, kind: str) -> np.ndarray:
        """(n,) bool: the questions of a kind; "score" is all of them. ValueError for a kind that is not asked."""
        if kind == "score":
            return np.ones(len(self), dtype=bool)
        if kind not in self.kinds:
            raise ValueError(f"{self.name} asks no {kind!r}; its kinds: {', '.join(self.kinds)}")
        return np.asarray(self.kind_of == self.kinds.index(kind))


def packed_bits(right: Sequence[bool]) -> str:
    """One bit a question, as text.

    >>> packed_bits([True, False, True]), unpacked_bits(packed_bits([True, False, True]), 3).tolist()
    ('oA==', [True, False, True])
    """
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode()


def unpacked_bits(text: str, n: int) -> np.ndarray:
    """(n,) bool; ValueError when the text holds another number."""
    raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(raw) != (n + 7) // 8:
        raise ValueError(f"{len(raw)} bytes hold no {n} answers")
    return np.unpackbits(raw)[:n].astype(bool)


def _packed_numbers(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.astype("<u4").tobytes(), 9)).decode()


def _unpacked_numbers(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<u4").astype(np.int64)


def references(items: Sequence[Item], task: str) -> list[Question]:
    """The questions behind items; ValueError for tasks that are scored in another way than right or wrong."""
    if not all(isinstance(item.reference, Question) for item in items):
        raise ValueError(f"task {task} is not right or wrong question by question; use pictograms, easy-vqa, fashion-mnist")
    return [item.reference for item in items]


def questions_sha256(items: Sequence[Item], task: str) -> str:
    """Hash of ids, pictures, words, answers and kinds, in order."""
    rows = [[q.id, q.image, q.text, q.answer, q.kind] for q in references(items, task)]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def question_set(name: str, items: Sequence[Item], task: Task, baselines: dict[str, dict[str, float]]) -> QuestionSet:
    """What is kept of `items`."""
    asked = references(items, task.name)
    kinds = tuple(dict.fromkeys(question.kind for question in asked))
    images = {image: i for i, image in enumerate(dict.fromkeys(question.image for question in asked))}
    return QuestionSet(
        name=name,
        sha256=questions_sha256(items, task.name),
        kinds=kinds,
        kind_of=np.array([kinds.index(question.kind) for question in asked]),
        image_of=np.array([images[question.image] for question in asked]),
        baselines=baselines,
    )


def questions_file(results: Path, name: str, sha256: str) -> Path:
    return results / QUESTIONS / f"{name}-{sha256[:12]}.json"


def write_questions(results: Path, questions: QuestionSet) -> None:
    """study/results/questions/NAME-HASH.json"""
    path = questions_file(results, questions.name, questions.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": questions.name,
        "sha256": questions.sha256,
        "n_questions": len(questions),
        "n_images": questions.n_images,
        "kinds": list(questions.kinds),
        "kind_of": _packed_numbers(questions.kind_of),
        "image_of": _packed_numbers(questions.image_of),
        "baselines": questions.baselines,
    }
    write_json(path, content)


def read_questions(results: Path, name: str, sha256: str) -> QuestionSet:
    """What `write_questions` wrote; ValueError names a file that is missing or damaged."""
    path = questions_file(results, name, sha256)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the questions that results speak of are missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind_of, image_of = _unpacked_numbers(found["kind_of"]), _unpacked_numbers(found["image_of"])
        kinds, baselines = tuple(found["kinds"]), found["baselines"]
    except (ValueError, KeyError, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it from git") from error
    if found["sha256"] != sha256 or len(kind_of) != len(image_of):
        raise ValueError(f"{path}: holds other questions than its name says; restore it from git")
    return QuestionSet(name, sha256, kinds, kind_of, image_of, baselines)


def right_answers(items: Sequence[Item], texts: Mapping[str, str]) -> list[bool]:
    """Which items were answered right, by exact match."""
    return [bool(plain_match(texts[item.id], item.reference.answer)) for item in items]


def metrics_of(name: str, right: np.ndarray, questions: QuestionSet) -> dict[str, float]:
    """{"NAME/score": percent, "NAME/KIND": ...}"""
    kinds = ("score", *questions.kinds)
    return {f"{name}/{kind}": round(100 * float(right[questions.of_kind(kind)].mean()), 4) for kind in kinds}


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two configs differ, in words.

    >>> differences({"training": {"steps": 10}, "start": "tiny"}, {"training": {"steps": 20}, "start": "tiny"})
    ['training.steps was 10, is 20']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        out = []
        for key in [*before, *(key for key in now if key not in before)]:
            there, here = before.get(key), now.get(key)
            if there != here:
                out += differences(there, here, f"{path}.{key}" if path else str(key))
        return out
    return [f"{path} was {before!r:.60}, is {now!r:.60}"] if before != now else []
