"""What a benchmark is to the runner: items with a picture, a prompt and a reference, and a way to score answers.

Source:  nothing; the shape is ours.
Differs: a task never sees the model, and the runner never sees an official file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import IO, Any, ClassVar, Protocol, get_type_hints, runtime_checkable

from PIL import Image

from htc_vlm.data.images import ImageError, named_warnings
from htc_vlm.registry import Registry
from htc_vlm.settings import typed

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question about one picture. Items with the same `image` share one loaded, compressed picture."""

    id: str
    image: str
    load: Callable[[], Image.Image]
    prompt: str
    reference: Any


@dataclass(frozen=True)
class Mark:
    """One question's share of a score, 0 to 1, and its picture: what `htc-vlm compare` resamples."""

    id: str
    image: str
    score: float


class Task(Protocol):
    """One benchmark. Instances are frozen dataclasses: their fields are the protocol choices, the paper's by default.

    `score` returns numbers in percent (MME: on its own scale); the key "score" is the one a table prints. A split
    without public answers has no score: it returns {} and `export` gives the official upload.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]  # the first is the default
    max_new_tokens: ClassVar[int]

    def load(self, root: Path, split: str) -> list[Item]:
        """All items of a split in their fixed order, read from the official files under `root`."""
        ...

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        """Numbers over `items`; `answers` holds exactly one answer for each of them."""
        ...


TASKS: Registry[Task] = Registry("task", group="htc_vlm.tasks")


@runtime_checkable
class Exports(Protocol):
    """A task that also writes predictions in the official upload format."""

    def export(self, items: Sequence[Item], answers: Mapping[str, str]) -> Any: ...


@runtime_checkable
class HasBaselines(Protocol):
    """A task that knows what answering blind gives: name -> numbers like those of `score`."""

    def baselines(self, items: Sequence[Item]) -> dict[str, dict[str, float]]: ...


@runtime_checkable
class HasMarks(Protocol):
    """A task whose questions have marks of their own: the share of each that is right, 0 to 1, one for each item; a class
    whose marks are of several items together says so by `marks_groups = True`."""

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]: ...


@runtime_checkable
class HasLayout(Protocol):
    """A task that says which files it reads, for the message when they are missing."""

    layout: ClassVar[str]


def find_tasks() -> Registry[Task]:
    """Import every file of eval/tasks/ (one file = one benchmark) and return the filled registry."""
    package = import_module("htc_vlm.eval.tasks")
    for module in iter_modules(package.__path__):
        import_module(f"htc_vlm.eval.tasks.{module.name}")
    return TASKS


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task called `name`, with protocol choices other than the defaults; ValueError names what is known."""
    cls: Any = find_tasks().get(name)
    check_dataclass(cls, name)
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(f"task {name} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}")
    hints = get_type_hints(cls)
    return cls(**{option: typed(f"task {name}: {option}", value, hints[option]) for option, value in (options or {}).items()})


def check_dataclass(cls: type, name: str) -> None:
    """ValueError for a task that is no dataclass, whose protocol choices would not be known."""
    if not is_dataclass(cls):
        raise ValueError(f"task {name} is {cls.__qualname__}, which is no dataclass; write @dataclass(frozen=True) above it")


def check_shares(where: str, marks: Sequence[Mark], then: str) -> None:
    """ValueError for a mark that is no share of 1; then: what to do."""
    for mark in marks:
        if not 0 <= mark.score <= 1:
            raise ValueError(f"{where}: the mark of {mark.id} is {mark.score}; marks go from 0 to 1; {then}")


def checked_marks(
    task: HasMarks, items: Sequence[Item], answers: Mapping[str, str], metrics: Mapping[str, float]
) -> Sequence[Mark]:
    """The marks, or ValueError: not from 0 to 1, or not one for each item. None at all are right without a score."""
    marks, name = task.marks(items, answers), getattr(task, "name", type(task).__name__)
    then = "mend the task and start again: the answers are kept"
    check_shares(f"task {name}", marks, then)
    expected = Counter(item.id for item in items) if marks or metrics else Counter()
    wrong = sorted((expected - (given := Counter(mark.id for mark in marks))) + (given - expected))
    if wrong and not getattr(task, "marks_groups", False):
        raise ValueError(
            f"task {name}: {len(marks)} marks for {len(items)} questions, not one for each ({', '.join(wrong[:5])}); {then}"
        )
    return marks


# ----------------------------------------------------------------------------- what the official readers share


@dataclass(frozen=True)
class PictureFile:
    """Loads one picture file as RGB when called, as LLaVA's evaluation does; ImageError names a damaged file."""

    path: Path

    def __call__(self) -> Image.Image:
        return picture_from(self.path, str(self.path))


def picture_at(path: Path) -> PictureFile:
    """A loader for one picture file; `eval/run.py::check_pictures` looks for the file before the run."""
    return PictureFile(path)


def picture_from(source: Path | IO[bytes], name: str) -> Image.Image:
    """A picture as RGB (PIL's `convert`, as in the official code); ImageError says what is wrong with `name`."""
    if isinstance(source, Path) and not source.is_file():
        raise ImageError(f"{name}: no such file; check the path")
    try:
        with named_warnings(name), Image.open(source) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, EOFError and more on damaged files
        raise ImageError(
            f"{name}: is damaged, truncated or no picture ({type(error).__name__}: {error}); download it again"
        ) from error


def read_text(path: Path) -> str:
    """The text of an official file, without a byte-order mark. FileNotFoundError and ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"official file missing: {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); download it again") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not empty. Only newlines end a line: U+2028 may stand in a question."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def read_json(path: Path) -> Any:
    """The JSON of an official file; FileNotFoundError says which file is missing, ValueError which is damaged."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: is not JSON ({error.msg}); download it again") from error


def read_json_lines(path: Path) -> list[Any]:
    """One JSON value per line; ValueError names file and line."""
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is not JSON ({error.msg}): {line[:60]!r}; download it again") from error
    return rows


def commonest(answers: Sequence[str]) -> str:
    """The answer that most people gave, "" of none.

    >>> commonest(["red", "blue", "red"])
    'red'
    """
    return Counter(answers).most_common(1)[0][0] if answers else ""


def percent(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of 1 -> percent."""
    return {name: 100.0 * share for name, share in shares.items()}


def with_score(shares: Mapping[str, float]) -> dict[str, float]:
    """{"overall": ..., kind: ...} as shares -> {"score": ..., kind: ...} in percent.

    >>> with_score({"overall": 0.5, "count": 1.0})
    {'score': 50.0, 'count': 100.0}
    """
    means = percent(shares)
    return {"score": means.pop("overall")} | means


def lettered_prompt(question: str, options: Mapping[str, str]) -> str:
    """LLaVA-1.5's multiple-choice prompt.

    >>> print(lettered_prompt("Which?", {"A": "cat", "B": "dog"}))
    Which?
    A. cat
    B. dog
    Answer with the option's letter from the given choices directly.
    """
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())]) + LETTER


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """ValueError when a protocol choice is none of those there are."""
    if value not in known:
        raise ValueError(f"{option} is one of {', '.join(known)}; got {value!r}")


def check_split(task: Task, split: str) -> None:
    """ValueError when a task has no such split."""
    if split not in task.splits:
        raise ValueError(f"task {task.name} has no split {split!r}; known: {', '.join(task.splits)}")
