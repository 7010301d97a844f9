"""answers.jsonl: one line per answer, appended and flushed as it comes, so that a killed run goes on where it was.

Source:  nothing; answers to POPE#17 and LLaVA's line-order joins.
Differs: only a torn *last* line, what a kill leaves, is repaired (dropped, and its question asked again). Anything
         else that is wrong with the file is an error that names the line or the ids; nothing is ever skipped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from htc_vlm.eval.task import Item


class AnswersError(ValueError):
    """The answers file does not fit the task: corrupt, unknown, duplicate or missing answers."""


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl. `seconds` is this question's share of its batch's wall time."""

    id: str
    image: str
    prompt: str
    answer: str
    seconds: float


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"


def _parse(line: str) -> Answer | None:
    try:
        record: Any = json.loads(line)
        answer = Answer(**record)
    except (json.JSONDecodeError, TypeError):
        return None
    return answer if all(isinstance(text, str) for text in (answer.id, answer.prompt, answer.answer)) else None


def repair_tail(path: Path) -> int:
    """Cut a torn last line off the file; a whole one that only lacks its newline gets it. -> bytes dropped."""
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return 0
    kept = data.rfind(b"\n") + 1
    if _parse(data[kept:].decode("utf-8", errors="replace")) is not None:
        with path.open("ab") as file:
            file.write(b"\n")
        return 0
    with path.open("r+b") as file:
        file.truncate(kept)
    print(f"{path}: dropped a torn last line ({len(data) - kept} bytes); its question is asked again", file=sys.stderr)
    return len(data) - kept


def read_answers(path: Path, items: Sequence[Item]) -> dict[str, Answer]:
    """Every answer of the file by question id; AnswersError names corrupt lines, duplicates and unknown ids.

    An answer given under another prompt than the item's counts as corrupt: it answers another question.
    """
    if not path.exists():
        return {}
    known = {item.id: item for item in items}
    answers: dict[str, Answer] = {}
    duplicates, unknown, other_prompt = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        answer = _parse(line)
        if answer is None:
            raise AnswersError(f"{path}, line {number} is corrupt: {line[:80]!r}. Mend or delete it by hand")
        if answer.id in answers:
            duplicates.append(answer.id)
        elif answer.id not in known:
            unknown.append(answer.id)
        elif answer.prompt != known[answer.id].prompt:
            other_prompt.append(answer.id)
        answers[answer.id] = answer
    for what, ids in (("answered twice", duplicates), ("not in this task", unknown),
                      ("answered under another prompt", other_prompt)):  # fmt: skip
        if ids:
            raise AnswersError(f"{path}: {len(ids)} question id(s) {what}: {_some(ids)}")
    return answers


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Append lines and flush them, in one write."""
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()


def require_all(answers: Mapping[str, Answer], items: Sequence[Item], path: Path) -> dict[str, str]:
    """{id: answer text} for exactly these items; AnswersError names the questions without an answer."""
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        raise AnswersError(f"{path}: {len(missing)} of {len(items)} questions have no answer: {_some(missing)}")
    return {item.id: answers[item.id].answer for item in items}


def answers_sha256(answers: Mapping[str, str]) -> str:
    """Hash of ids and answers in order; timings do not enter, so equal answers give equal hashes."""
    lines = "\n".join(json.dumps([question, answer], ensure_ascii=False) for question, answer in answers.items())
    return hashlib.sha256(lines.encode()).hexdigest()
