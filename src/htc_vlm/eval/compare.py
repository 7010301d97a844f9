"""Two models on the same questions: the difference of their scores with a paired bootstrap interval.

Source:  Efron and Tibshirani 1993, chapter 13 (percentile interval), pairs resampled together.
Differs: pictures are resampled, not questions: the questions of one picture rise and fall together, and an interval
         over single questions would be too narrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htc_vlm.eval.task import Mark, check_shares
from htc_vlm.files import read_object, read_text, write_text

AGAIN = "run the same `htc-vlm eval` again: it asks nothing twice and writes it"
MARKS = "marks.jsonl"


@dataclass(frozen=True)
class Difference:
    """first - second in points of percent, with its interval; `share_above_zero` of the resamples favour the first."""

    points: float
    low: float
    high: float
    share_above_zero: float
    n_questions: int
    n_images: int


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    images: Sequence[str],
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Difference of two models' mean scores (shares of 1, one per question), resampling pictures.

    The i-th entry of all three belongs to one question. Raises ValueError on unequal lengths or fewer than two
    pictures.

    >>> same = paired_bootstrap([1, 0, 1, 1], [1, 0, 1, 1], ["a", "a", "b", "c"])
    >>> same.points, same.low, same.high
    (0.0, 0.0, 0.0)
    """
    if not len(first) == len(second) == len(images):
        raise ValueError(f"pairs needed, got {len(first)} and {len(second)} scores for {len(images)} images")
    names, image_of = np.unique(np.asarray(images), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a bootstrap over pictures needs at least two, got {len(names)}")
    gain = np.bincount(image_of, weights=np.asarray(first, float) - np.asarray(second, float))  # (images,)
    n_asked = np.bincount(image_of)
    generator = np.random.default_rng(seed)
    differences = np.empty(n_resamples)
    for start in range(0, n_resamples, 1000):  # a thousand at a time bounds the memory
        drawn = generator.integers(len(names), size=(min(1000, n_resamples - start), len(names)))
        differences[start : start + len(drawn)] = gain[drawn].sum(1) / n_asked[drawn].sum(1)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        points=100 * float(gain.sum() / n_asked.sum()),
        low=100 * float(low),
        high=100 * float(high),
        share_above_zero=float((differences > 0).mean()),
        n_questions=len(first),
        n_images=len(names),
    )


@dataclass(frozen=True)
class Interval:
    """A mean in percent with its bootstrap interval over pictures."""

    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two results on the same questions: each share of marks, their difference, and the scores that tables print.

    The difference is of marks (questions right, soft accuracies; MMBench: whole circles). POPE's F1 and MME's sum are
    no means of marks: they stand beside, as `score`, without an interval.
    """

    task: str
    first: Interval
    second: Interval
    difference: Difference
    first_score: float
    second_score: float


def write_marks(path: Path, marks: Sequence[Mark]) -> None:
    """One line per question."""
    write_text(path, "".join(json.dumps(asdict(mark)) + "\n" for mark in marks))


def read_marks(path: Path) -> list[Mark]:
    """The marks of a result; FileNotFoundError says how to make them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {AGAIN}")
    marks = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            marks += [Mark(**json.loads(line))] if line else []
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is damaged ({error}); {AGAIN}") from error
    check_shares(str(path), marks, f"mend the task, and {AGAIN}")
    return marks


def result_folders(path: Path) -> dict[str, Path]:
    """{"gqa-testdev_balanced": folder, ...} of an evaluation's output, or of one task's folder or result.json in it."""
    path = path.parent if path.name == "result.json" else path
    if (path / "result.json").is_file():
        return {path.name: path}
    found = {folder.parent.name: folder.parent for folder in sorted(path.glob("*/result.json"))}
    if not found:
        raise FileNotFoundError(f"{path}: holds no result.json; give an --output of `htc-vlm eval`, or one task's folder in it")
    return found


def compare_results(first: Path, second: Path, *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two folders with result.json and marks.jsonl; ValueError unless they hold the same questions, asked alike."""
    results = [read_object(folder / "result.json", AGAIN) for folder in (first, second)]
    for what in ("task", "split", "protocol"):
        for folder, result in zip((first, second), results, strict=True):
            if what not in (result.get("config") or {}):
                raise ValueError(f"{folder / 'result.json'}: says no {what}, so it is no result of `htc-vlm eval`")
        values = [result["config"][what] for result in results]
        if values[0] != values[1]:
            raise ValueError(f"{first} and {second} differ in {what}: {values[0]!r}, {values[1]!r}")
    for folder, result in zip((first, second), results, strict=True):
        if result.get("n_marks", 0) is None:
            raise ValueError(f"{folder}: its task has no `marks`, which are what is compared")
        if "score" not in result["metrics"]:
            raise ValueError(f"{folder}: has no score, this split's answers are not public; there is nothing to compare")
    marks = [{mark.id: mark for mark in read_marks(folder / MARKS)} for folder in (first, second)]
    n_single = len(set(marks[0]) ^ set(marks[1]))
    if n_single:
        raise ValueError(
            f"{first} answers {len(marks[0])} questions, {second} {len(marks[1])}, and {n_single} are in one of them only; "
            "evaluate both with the same --limit"
        )
    images = [mark.image for mark in marks[0].values()]
    scores = [[by_id[question].score for question in marks[0]] for by_id in marks]
    options: dict[str, Any] = {"n_resamples": n_resamples, "level": level, "seed": seed}
    alone = [paired_bootstrap(score, [0.0] * len(score), images, **options) for score in scores]
    one, other = (Interval(mean.points, mean.low, mean.high) for mean in alone)
    difference = paired_bootstrap(scores[0], scores[1], images, **options)
    return Comparison(first.name, one, other, difference, *(float(result["metrics"]["score"]) for result in results))


def compare_outputs(
    first: Path, second: Path, *, n_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Iterator[tuple[str, Comparison | str]]:
    """(task, comparison, or why there is none) of each task in either of two outputs. Two single folders may be of any name."""
    found = [result_folders(path) for path in (first, second)]
    if [len(folders) for folders in found] == [1, 1]:
        found[1] = dict(zip(found[0], found[1].values(), strict=True))
    for task in sorted(set(found[0]) | set(found[1])):
        single = [path for path, folders in zip((first, second), found, strict=True) if task not in folders]
        if single:
            yield task, f"{single[0]} has no result of it"
            continue
        folders = found[0][task], found[1][task]
        try:
            yield task, compare_results(*folders, n_resamples=n_resamples, level=level, seed=seed)
        except (ValueError, OSError) as error:
            yield task, str(error)
