"""LLaVA's conversation files: read and checked; ids and labels built together from the same pieces.

Source:  LLaVA's data format (docs/Finetune_Custom_Data.md) and `preprocess_v1` (llava/train/train.py).
Differs: every piece of text is tokenised once and its labels are made beside its ids, where LLaVA tokenises twice,
         counts, and sets all labels to "ignore" when the counts disagree. A sample that does not fit is refused
         by its id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htc_vlm.data.images import DEFAULT_MAX_PIXELS, ImageError, load_image
from htc_vlm.data.prompt_ids import PromptIds, Tokenizer
from htc_vlm.data.prompts import IMAGE, TINY, PromptStyle

IGNORE = -100           # the label that cross_entropy skips
HUMAN, GPT = "human", "gpt"
N_ERRORS_SHOWN = 5


class ConversationError(ValueError):
    """A conversation file or sample that cannot be used; names the file, the sample and the remedy."""


@dataclass(frozen=True)
class Turn:
    """One question, in which `<image>` marks the place of an image, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One sample: turns, and the picture files in the order of their `<image>`."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one sequence, equally long. question_ids: see `pack`; None = not packed."""

    id: str
    input_ids: list[int]
    labels: list[int]
    question_ids: list[int] | None = None

    @property
    def n_supervised(self) -> int:
        """How many tokens a loss is taken on."""
        return sum(label != IGNORE for label in self.labels)


def encode(
    record: Record, tokenizer: Tokenizer, image_text: str | Sequence[str], style: PromptStyle = TINY
) -> Encoded:
    """A conversation as one sequence; labels are the answers with their ends, -100 elsewhere.

    `image_text` is what stands for one image, or for each: its placeholders and bottleneck tokens, from the processor.
    Each answer follows the ids that `prompt_ids.PromptIds.question` gives when its question is asked.
    """
    made = PromptIds(tokenizer, style)
    input_ids: list[int] = []
    labels: list[int] = []
    prompts = made.prompts([turn.question for turn in record.turns], image_text)
    for turn, prompt_ids in zip(record.turns, prompts, strict=True):
        answer_ids = made.answer(turn.answer)
        input_ids += prompt_ids + answer_ids
        labels += [IGNORE] * len(prompt_ids) + answer_ids
    return Encoded(id=record.id, input_ids=input_ids, labels=labels)


def encode_questions(
    id: str, turns: Sequence[Turn], tokenizer: Tokenizer, image_text: str, style: PromptStyle = TINY
) -> Encoded:
    """Many separate questions about one image, packed into one sequence: see `pack`. Questions without `<image>`.

    Each question's ids and visible context equal those of `encode` on it alone.
    """
    if not style.images_first:
        raise ValueError("packing needs the image in front of its questions; use a style with images_first=True")
    inside = [turn.question for turn in turns if IMAGE in turn.question]
    if inside:
        raise ValueError(f"{id}: a packed question contains {IMAGE}: {inside[0]!r}; the image is given once, in front")
    made = PromptIds(tokenizer, style)
    prompts = [tokenizer.encode(style.prompt(turn.question), add_special_tokens=False) for turn in turns]
    blocks = [(prompt, made.answer(turn.answer)) for prompt, turn in zip(prompts, turns, strict=True)]
    return pack(id, made.begin(image_text), blocks)


def pack(id: str, image_ids: Sequence[int], questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Encoded:
    """[image][question 1, answer 1][question 2, answer 2] ... ; question_ids 0 for the image and 1, 2, ... per block.

    The model keeps the blocks from seeing each other and restarts their positions after the image, both from
    question_ids (`ops.masks.same_question`, `ops.rope.position_ids`): one reading of the image trains all questions.

    >>> packed = pack("a", [7, 7, 8], [([1, 2], [3, 0]), ([4], [5, 0])])
    >>> packed.input_ids
    [7, 7, 8, 1, 2, 3, 0, 4, 5, 0]
    >>> packed.labels
    [-100, -100, -100, -100, -100, 3, 0, -100, 5, 0]
    >>> packed.question_ids
    [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    """
    if not questions:
        raise ValueError(f"{id}: nothing to pack; give at least one question")
    input_ids, labels, question_ids = list(image_ids), [IGNORE] * len(image_ids), [0] * len(image_ids)
    for number, (prompt_ids, answer_ids) in enumerate(questions, start=1):
        input_ids += [*prompt_ids, *answer_ids]
        labels += [IGNORE] * len(prompt_ids) + list(answer_ids)
        question_ids += [number] * (len(prompt_ids) + len(answer_ids))
    return Encoded(id=id, input_ids=input_ids, labels=labels, question_ids=question_ids)


def load_conversations(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None, check_files: bool = True
) -> list[Record]:
    """Every sample of a JSON array or of JSON lines. Raises one ConversationError, which lists the first bad samples.

    Picture paths are taken below `image_folder` (default: the file's own folder); with `check_files` each must exist.
    `check_pictures` also decodes them.
    """
    file = Path(path)
    folder = file.parent if image_folder is None else Path(image_folder)
    records, errors = [], []
    for number, sample in _samples(file):
        try:
            record = parse_sample(sample, f"sample {number}", folder)
            if check_files:
                _check_exist(record)
            records.append(record)
        except ConversationError as error:
            errors.append(str(error))
    if errors:
        more = f"; and {len(errors) - N_ERRORS_SHOWN} more" if len(errors) > N_ERRORS_SHOWN else ""
        raise ConversationError(f"{path}: {'; '.join(errors[:N_ERRORS_SHOWN])}{more}")
    if not records:
        raise ConversationError(f"{path}: holds no samples; expected a JSON array or one sample per line")
    return records


def _samples(file: Path) -> Iterable[tuple[int, Any]]:
    """(number from 1, parsed JSON) of each sample; a file that begins with `{` is read as JSON lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversationError(f"{file}: is not UTF-8 text ({error}); save it as UTF-8") from error
    if not text.lstrip().startswith("{"):
        try:
            samples = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise ConversationError(f"{file}: is not JSON: {error}") from error
        if not isinstance(samples, list):
            raise ConversationError(f"{file}: is {_kind(samples)}; expected a JSON array of samples")
        return list(enumerate(samples, start=1))
    parsed = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                parsed.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ConversationError(
                    f"{file}: line {number} is not JSON: {error}; a file that begins with {{ holds one sample per line"
                ) from error
    return parsed


def parse_sample(sample: Any, where: str, image_folder: Path) -> Record:
    """One sample as parsed from JSON -> Record. Raises ConversationError naming `where` and the sample's id."""
    _require(isinstance(sample, dict), f"{where} is {_kind(sample)}; expected an object with id and conversations")
    id_ = sample.get("id")
    has_id = isinstance(id_, str | int) and not isinstance(id_, bool) and id_ != ""
    _require(has_id, f"{where} has no id; give each sample one")
    where = f"{where} (id {id_!r})"
    _require("conversations" in sample, f"{where} has no conversations; it has {', '.join(sample)}")
    turns = _turns(sample["conversations"], where)
    names = _image_names(sample.get("image"), where)
    n_marks = sum(turn.question.count(IMAGE) for turn in turns)
    _require(
        n_marks == len(names),
        f"{where} has {n_marks} {IMAGE} in its questions and {len(names)} images; write one {IMAGE} per image",
    )
    return Record(id=str(id_), turns=turns, images=tuple(image_folder / name for name in names))


def _turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    """Pairs of human and gpt messages."""
    _require(isinstance(conversations, list) and conversations, f"{where} has no messages; expected human, gpt, ...")
    for number, message in enumerate(conversations):
        expected = (HUMAN, GPT)[number % 2]
        here = f"{where}, message {number + 1}"
        _require(isinstance(message, dict), f"{here} is {_kind(message)}; expected an object with from and value")
        missing = [key for key in ("from", "value") if key not in message]
        _require(not missing, f"{here} has no {' and no '.join(missing)}")
        _require(
            message["from"] == expected,
            f"{here} is from {message['from']!r}, expected {expected!r}; messages alternate: human, gpt, human, gpt",
        )
        _require(isinstance(message["value"], str), f"{here}: value is {_kind(message['value'])}; expected a string")
    _require(len(conversations) % 2 == 0, f"{where} ends with a question; add its answer or remove it")
    values = [message["value"].strip() for message in conversations]
    turns = tuple(Turn(question, answer) for question, answer in zip(values[::2], values[1::2], strict=True))
    for turn in turns:
        _require(IMAGE not in turn.answer, f"{where} has {IMAGE} in an answer; images belong to questions")
        _require(turn.answer != "", f"{where} has an empty answer, which teaches nothing; remove that turn")
    return turns


def _image_names(image: Any, where: str) -> list[str]:
    """The `image` entry, absent, one name or a list of names, as a list."""
    names = [] if image is None else image if isinstance(image, list) else [image]
    for name in names:
        is_name = isinstance(name, str) and name != ""
        _require(is_name, f"{where}: image is {name!r}; expected a file name or a list of them")
    return names


def _check_exist(record: Record) -> None:
    for image in record.images:
        _require(image.is_file(), f"sample {record.id!r}: no picture {image}; check image_folder")


def _require(fact: object, message: str) -> None:
    if not fact:
        raise ConversationError(message)


def _kind(value: Any) -> str:
    """What JSON calls a parsed value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_pictures(records: Iterable[Record], max_pixels: int = DEFAULT_MAX_PIXELS) -> list[str]:
    """Decode every picture once; one line "sample ID: PATH: what is wrong" for each that cannot be used."""
    seen: dict[Path, str | None] = {}
    lines = []
    for record in records:
        for image in record.images:
            if image not in seen:
                try:
                    load_image(image, max_pixels)
                    seen[image] = None
                except ImageError as error:
                    seen[image] = str(error)
            if seen[image] is not None:
                lines.append(f"sample {record.id!r}: {seen[image]}")
    return lines
