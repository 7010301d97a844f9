"""MME: fourteen subtasks of yes-no questions, two per picture; perception (2000 points) and cognition (800).

Source:  Fu et al. 2023; MME_Benchmark_release_version and eval_tool/calculation.py; prompt as in LLaVA-1.5
         (llava_mme.jsonl: the official "Please answer yes or no." gives way to the short-answer prompt).
Differs: nothing known in the score. A subtask that is not there is an error.

`headline`: Table 1 of the paper prints perception (the default), Table 2 perception + cognition: "total".
Two layouts are official: <subtask>/<x>.txt beside its picture, or <subtask>/questions_answers_YN/<x>.txt with
<subtask>/images/<x>.*. Each text holds two lines, question TAB Yes|No.

Files:   mme/MME_Benchmark_release_version/<subtask>/...; or, below mme/, the parquet files of lmms-lab/MME: data/test-*.parquet
Prompt:  <question>\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows
from htc_vlm.eval.score import MME_COGNITION, MME_PERCEPTION, mme_reads, mme_scores
from htc_vlm.eval.task import SHORT, TASKS, Item, Mark, check_choice, picture_at, read_lines

_PICTURES = (".jpg", ".png", ".jpeg")
_OFFICIAL_END = "Please answer yes or no."


def _texts_and_pictures(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(question file, its picture) of one subtask, sorted by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"MME subtask missing: {folder}")
    divided = (folder / "questions_answers_YN").is_dir()
    texts, pictures = (folder / "questions_answers_YN", folder / "images") if divided else (folder, folder)
    named = sorted(texts.glob("*.txt"))
    if not named:
        raise FileNotFoundError(f"MME subtask without questions: no .txt in {texts}")
    for text in named:
        found = [pictures / (text.stem + end) for end in _PICTURES if (pictures / (text.stem + end)).is_file()]
        if len(found) != 1:
            raise FileNotFoundError(f"MME: {text} needs one picture named {text.stem}.* in {pictures}, found {found}")
        yield text, found[0]


def _questions(text: Path) -> list[tuple[str, str]]:
    lines = [line.split("\t") for _, line in read_lines(text)]
    if len(lines) != 2 or any(len(fields) != 2 for fields in lines):
        raise ValueError(f"MME: {text} should hold two lines 'question TAB answer', holds {lines}")
    return [(question.strip(), answer.strip()) for question, answer in lines]


@TASKS.register("mme")
@dataclass(frozen=True)
class Mme:
    name: ClassVar[str] = "mme"
    splits: ClassVar[tuple[str, ...]] = ("release",)
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "mme/MME_Benchmark_release_version/<subtask>/*.txt beside their pictures, or, below mme/, lmms-lab/MME's "
        "data/test-*.parquet"
    )
    headline: str = "perception"

    def __post_init__(self) -> None:
        check_choice("mme.headline", self.headline, ("perception", "cognition", "total"))

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "mme" / "MME_Benchmark_release_version"
        files = hub_files(root / "mme", "test")
        if files and not folder.is_dir():
            return self._from_hub(files)
        return [
            Item(f"{image}/{number}", image, picture_at(picture), question.replace(_OFFICIAL_END, "").strip() + SHORT,
                 {"subtask": subtask, "image": image, "answer": answer})
            for subtask in MME_PERCEPTION + MME_COGNITION
            for text, picture in _texts_and_pictures(folder / subtask)
            for image in [f"{subtask}/{picture.name}"]
            for number, (question, answer) in enumerate(_questions(text))
        ]  # fmt: skip

    @staticmethod
    def _from_hub(files: Sequence[Path]) -> list[Item]:
        """In the order of the official folders; a picture's first row is its question 0."""
        subtasks = MME_PERCEPTION + MME_COGNITION
        rows = list(hub_rows(files, ["question_id", "question", "answer", "category"]))
        unknown = sorted({row["category"] for row, _ in rows} ^ set(subtasks))
        if unknown:
            raise FileNotFoundError(f"MME subtask missing or unknown in {files[0].parent}: {', '.join(unknown)}")
        rows.sort(key=lambda pair: (subtasks.index(pair[0]["category"]), pair[0]["question_id"]))
        seen: Counter[str] = Counter()
        items = []
        for row, picture in rows:
            image = f"{row['category']}/{row['question_id'].split('/')[-1]}"
            prompt = row["question"].replace(_OFFICIAL_END, "").strip() + SHORT
            reference = {"subtask": row["category"], "image": image, "answer": row["answer"]}
            items.append(Item(f"{image}/{seen[image]}", image, picture, prompt, reference))
            seen[image] += 1
        return items

    def facts(self, item: Item) -> Facts:
        return Facts(item.prompt, item.reference["answer"].strip().lower())

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [
            Mark(item.id, item.image, mme_reads(answers[item.id]) == item.reference["answer"].strip().lower()) for item in items
        ]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        rows: list[dict[str, Any]] = [item.reference | {"prediction": answers[item.id]} for item in items]
        scores = mme_scores(rows)
        subtasks = {name: subtask["score"] for name, subtask in scores.pop("subtasks").items()}
        return {"score": scores[self.headline]} | scores | subtasks
