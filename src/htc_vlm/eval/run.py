"""The runner: task x answerer -> answers.jsonl -> result.json. Restartable; nothing asked twice, nothing lost.

Source:  nothing; the demands are ours.
Differs: questions of one picture are asked together, so that a picture is loaded and compressed once.

Layout of an output folder: <output>/<task>-<split>/{settings.json, answers.jsonl, marks.jsonl, result.json[, export.json]}.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.data.images import ImageError
from htc_vlm.eval.answers import (
    Answer,
    AnswersError,
    answers_sha256,
    append_answers,
    read_answers,
    repair_tail,
    require_all,
)
from htc_vlm.eval.blind import blind_baselines
from htc_vlm.eval.compare import MARKS, write_marks
from htc_vlm.eval.run_info import provenance
from htc_vlm.eval.task import (
    Exports,
    HasBaselines,
    HasLayout,
    HasMarks,
    Item,
    PictureFile,
    Task,
    check_dataclass,
    check_split,
    checked_marks,
    make_task,
)
from htc_vlm.files import read_object, write_json


class Answerer(Protocol):
    """Anything that answers questions about a picture."""

    def answer(
        self, image_key: str, load_image: Callable[[], Image.Image], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        """One answer per question. `image_key` names the picture: the same key is the same picture."""
        ...


@dataclass(frozen=True)
class Ask:
    """The open questions about one picture."""

    image_key: str
    load_image: Callable[[], Image.Image]
    questions: list[str]


@runtime_checkable
class BatchAnswerer(Protocol):
    """An answerer that can take several pictures at once; the runner uses this where it exists."""

    def answer_batch(self, asks: Sequence[Ask], max_new_tokens: int) -> list[list[str]]: ...


def batches(items: Sequence[Item], batch_size: int) -> Iterator[list[list[Item]]]:
    """Items grouped by picture, in order of first appearance, and packed into batches of `batch_size` questions.

    A picture's questions stay together unless they alone exceed `batch_size`.
    """
    by_image: dict[str, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    batch: list[list[Item]] = []
    for group in by_image.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            if batch and sum(map(len, batch)) + len(part) > batch_size:
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


def ask_batch(answerer: Answerer, batch: Sequence[Sequence[Item]], max_new_tokens: int) -> list[Answer]:
    """Ask one batch; ValueError when the answerer returns another number of answers than questions."""
    asks = [Ask(group[0].image, partial(_load, group[0]), [item.prompt for item in group]) for group in batch]
    started = time.perf_counter()
    if isinstance(answerer, BatchAnswerer):
        texts = answerer.answer_batch(asks, max_new_tokens)
    else:
        texts = [answerer.answer(ask.image_key, ask.load_image, ask.questions, max_new_tokens) for ask in asks]
    n_asked = sum(map(len, batch))
    seconds = round((time.perf_counter() - started) / n_asked, 6)
    if [len(group) for group in texts] != [len(group) for group in batch]:
        raise ValueError(
            f"asked {[len(group) for group in batch]} questions about pictures {[ask.image_key for ask in asks]}, "
            f"got {[len(group) for group in texts]} answers"
        )
    return [
        Answer(item.id, item.image, item.prompt, text, seconds)
        for group, answers in zip(batch, texts, strict=True)
        for item, text in zip(group, answers, strict=True)
    ]


def _load(item: Item) -> Image.Image:
    """The item's picture; an ImageError also names the question."""
    try:
        return item.load()
    except ImageError as error:
        raise ImageError(f"{error} (question {item.id})") from error


def check_single_process() -> None:
    """ValueError under torchrun: every process would ask every question."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(
            f"an evaluation runs in one process, and torchrun started {world}; start it without torchrun, for several GPUs "
            "one process each with its own --task (or --split) and --device"
        )


def check_pictures(items: Sequence[Item]) -> None:
    """FileNotFoundError that counts the picture files that are not there, before anything is asked."""
    files = dict.fromkeys(item.load.path for item in items if isinstance(item.load, PictureFile))
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(f"{len(missing)} of {len(files)} pictures are missing: {shown}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one run at a time in a folder; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AnswersError(f"{folder}: another evaluation is writing there; wait for it, or choose another --output") from None
    try:
        yield
    finally:
        lock.release()


def run_task(
    answerer: Answerer,
    task: Task | str,
    output: str | Path,
    limit: int | None = None,
    batch_size: int = 32,
    *,
    root: str | Path = ".",
    split: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    config: Mapping[str, Any] | None = None,
    items: list[Item] | None = None,
) -> dict[str, Any]:
    """Ask `task`'s questions, score them, write result.json and return it.

    `limit` takes the first N questions of the fixed order; `root` is the folder of the official files; `config` is
    what identifies the model (a restart under another config is refused); `items` what `load_items` gave, if it was
    called before. Raises AnswersError when the answers file does not fit, when another process writes there, and when
    the folder holds the result of more questions.
    """
    check_single_process()
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give at least 1, or leave it out for all questions")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    task, split, items, folder = _open_task(task, output, root, split, items)
    settings = {"task": task.name, "split": split, "protocol": asdict(task), "model": dict(config or {})}  # type: ignore[call-overload]
    chosen = items if limit is None else items[:limit]
    with _locked(folder):
        _same_settings(folder / "settings.json", settings)
        _no_smaller_result(folder / "result.json", len(chosen))
        answers = ask_items(answerer, task, items, chosen, folder / "answers.jsonl", batch_size)
        result = _scored(task, chosen, answers, folder)
        texts = {item.id: answers[item.id].answer for item in chosen}
        marks = checked_marks(task, chosen, texts, result["metrics"]) if isinstance(task, HasMarks) else None
        result |= {
            "split": split,
            "limit": limit,
            "config": settings,
            "seed": seed,
            "device": device,
            "n_marks": None if marks is None else len(marks),
        }
        if isinstance(task, Exports):
            write_json(folder / "export.json", task.export(chosen, texts))
        if marks is not None:
            write_marks(folder / MARKS, marks)
        write_json(folder / "result.json", result | provenance())
    return result | provenance()


def rescore(
    task: Task | str, output: str | Path, limit: int | None = None, *, root: str | Path = ".", split: str | None = None
) -> dict[str, Any]:
    """Score the answers that are there, asking and writing nothing; AnswersError names what is missing."""
    task, split, items, folder = _open_task(task, output, root, split)
    answers = read_answers(folder / "answers.jsonl", items)
    return _scored(task, items if limit is None else items[:limit], answers, folder)


def load_items(task: Task, root: str | Path, split: str | None = None) -> list[Item]:
    """The questions of a task's split (None: its first). FileNotFoundError shows the files that the task reads."""
    split = task.splits[0] if split is None else split
    check_split(task, split)
    try:
        items = task.load(Path(root), split)
    except FileNotFoundError as error:
        expected = f". Task {task.name} reads, below {root}: {task.layout}" if isinstance(task, HasLayout) else ""
        raise FileNotFoundError(f"{error}{expected}") from error
    return checked(items, task.name)


def task_folder(task: Task, output: str | Path, split: str | None) -> Path:
    """Where a task's answers and result go."""
    return Path(output) / f"{task.name}-{task.splits[0] if split is None else split}"


def _open_task(
    task: Task | str, output: str | Path, root: str | Path, split: str | None, items: list[Item] | None = None
) -> tuple[Task, str, list[Item], Path]:
    task = make_task(task) if isinstance(task, str) else task
    check_dataclass(type(task), task.name)
    items = load_items(task, root, split) if items is None else items
    return task, task.splits[0] if split is None else split, items, task_folder(task, output, split)


def _scored(task: Task, chosen: Sequence[Item], answers: Mapping[str, Answer], folder: Path) -> dict[str, Any]:
    """The numbers over exactly `chosen`. ValueError where the task gives numbers, and none of them is the score."""
    texts = require_all(answers, chosen, folder / "answers.jsonl")
    metrics = task.score(chosen, texts)
    baselines = task.baselines(chosen) if isinstance(task, HasBaselines) else blind_baselines(task, chosen)
    for what, numbers in (("score", metrics), *((f"baseline {name!r}", numbers) for name, numbers in baselines.items())):
        if numbers and "score" not in numbers:
            raise ValueError(
                f"task {task.name}: its {what} gives {', '.join(numbers)}, but no \"score\", the number that tables print; "
                f"mend the task and start again: the answers are kept in {folder}"
            )
    return {
        "task": task.name,
        "metrics": metrics,
        "baselines": baselines,
        "n_questions": len(chosen),
        "n_images": len({item.image for item in chosen}),
        "answers_sha256": answers_sha256(texts),
        "seconds": round(sum(answers[item.id].seconds for item in chosen), 3),
    }


def ask_items(
    answerer: Answerer, task: Task, items: Sequence[Item], chosen: Sequence[Item], path: Path, batch_size: int
) -> dict[str, Answer]:
    """Ask those of `chosen` that the file `path` does not answer yet -> all its answers, re-read, by question id.

    items: every question that the file may hold. What was answered is in the file when this is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        repair_tail(path)
    answers = read_answers(path, items)
    open_items = [item for item in chosen if item.id not in answers]
    check_pictures(open_items)
    n_done = len(chosen) - len(open_items)
    with tqdm(total=len(chosen), initial=n_done, desc=path.parent.name, unit="question") as bar:
        for batch in batches(open_items, batch_size):
            append_answers(path, ask_batch(answerer, batch, task.max_new_tokens))
            bar.update(sum(map(len, batch)))
    return read_answers(path, items)


def checked(items: list[Item], task_name: str) -> list[Item]:
    """The items, or ValueError: a task without questions, with an id used twice or one that is no text cannot be scored."""
    if not items:
        raise ValueError(f"task {task_name} has no questions in this folder and split")
    for item in items:
        for name in ("id", "image", "prompt"):
            value = getattr(item, name)
            if not isinstance(value, str):
                raise ValueError(f"task {task_name}: an item's {name} is {value!r:.60}, a {type(value).__name__}; give text")
    twice = [question for question, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        raise ValueError(f"task {task_name} uses question ids twice: {', '.join(twice[:10])}")
    return items


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new run; refuse to go on with a run that was made under other settings."""
    if not path.exists():
        write_json(path, settings)
        return
    before = read_object(path, "choose another --output")
    now = json.loads(json.dumps(settings))
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in different)
        raise AnswersError(f"{path.parent} holds answers made under other settings: {told}. Choose another --output")


def _no_smaller_result(path: Path, n_questions: int) -> None:
    """Refuse to replace the result of more questions than are asked for now."""
    if not path.exists():
        return
    before = read_object(path, "choose another --output").get("n_questions", 0)
    if before > n_questions:
        raise AnswersError(
            f"{path} is the result of {before} questions; one of {n_questions} would replace it. Leave out --limit, or choose "
            "another --output"
        )
