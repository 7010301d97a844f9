"""ScienceQA-IMG: the test questions that have a picture.

Source:  Lu et al. 2022; data/scienceqa of lupantech/ScienceQA; scoring as in LLaVA (eval_science_qa.py).
Differs: a question without an answer is an error; LLaVA gives it the prompt "Unknown", which takes it out of the
         image-accuracy denominator. At most 128 new tokens (LLaVA allows 1024).

`prompt`: LLaVA's llava_test_CQM-A.json (context, question, choices) is published only inside eval.zip. "letters" (the
default) is the wording by which lmms-eval reproduces its number; "cqm" is what LLaVA's convert_sqa_to_llava.py writes
for CQM-A. The order matters: users report 44.8 with the context last, 66.8 with it first (LLaVA#1294).
The paper's 66.5 (Table 1) and 69.5 (Table 2) are two different uncompressed numbers; LLaVA-1.5 reports 66.8.

Files:   scienceqa/{pid_splits,problems}.json, scienceqa/images/test/<id>/image.png; or, below scienceqa/, the parquet
         files of lmms-lab/ScienceQA (ScienceQA-IMG/{test,validation}-*.parquet) or derek-thomas/ScienceQA (data/...)
Prompt:  [Context: <hint>\\n]<question>\\nA. <choice>\\nB. ...
         Answer with the option's letter from the given choices directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.score import mean_by_kind, scienceqa_letter
from htc_vlm.eval.task import LETTER, TASKS, Item, Mark, check_choice, lettered_prompt, picture_at, read_json, with_score


@TASKS.register("scienceqa")
@dataclass(frozen=True)
class ScienceQa:
    name: ClassVar[str] = "scienceqa"
    splits: ClassVar[tuple[str, ...]] = ("test", "val", "minitest", "minival")
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "scienceqa/problems.json, scienceqa/pid_splits.json and scienceqa/images/test/<id>/image.png, or, below scienceqa/, "
        "lmms-lab/ScienceQA's ScienceQA-IMG/{test,validation}-*.parquet"
    )
    prompt: str = "letters"

    def __post_init__(self) -> None:
        check_choice("scienceqa.prompt", self.prompt, ("letters", "cqm"))

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "scienceqa"
        files = hub_files(folder, {"val": "validation"}.get(split, split), ("ScienceQA-IMG", "ScienceQA-FULL"))
        if reads_hub(folder / "problems.json", files):
            return self._from_hub(files, split)
        problems = read_json(folder / "problems.json")
        pictures = folder / "images" / split.removeprefix("mini")
        return [
            Item(pid, pid, picture_at(pictures / pid / problems[pid]["image"]), self._prompt(problems[pid]),
                 problems[pid])
            for pid in read_json(folder / "pid_splits.json")[split]
            if problems[pid]["image"] is not None
        ]  # fmt: skip

    def _from_hub(self, files: Sequence[Path], split: str) -> list[Item]:
        """The files have no problem ids: a question is called by its place among those with a picture."""
        rows = hub_rows(files, ["question", "choices", "answer", "hint", "subject"])
        shown = [(row, picture) for row, picture in rows if picture is not None]
        return [
            Item(f"{split}/{number}", f"{split}/{number}", picture, self._prompt(row), row)
            for number, (row, picture) in enumerate(shown)
        ]

    def _prompt(self, problem: Mapping[str, Any]) -> str:
        choices = dict(zip(ascii_uppercase, problem["choices"], strict=False))
        hint = (problem["hint"] or "").strip()
        if self.prompt == "letters":
            return lettered_prompt((f"Context: {hint}\n" if hint else "") + problem["question"], choices)
        options = " ".join(f"({letter}) {text}" for letter, text in choices.items())
        asked = f"Context: {hint or 'N/A'}\nQuestion: {problem['question']}\nOptions: {options}"
        return asked.replace("  ", " ").strip() + LETTER

    def facts(self, item: Item) -> Facts:
        options = dict(zip(ascii_uppercase, item.reference["choices"], strict=False))
        return Facts(item.reference["question"], ascii_uppercase[item.reference["answer"]], options)

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [
            Mark(item.id, item.image, scienceqa_letter(answers[item.id], len(item.reference["choices"]))
                 == ascii_uppercase[item.reference["answer"]])
            for item in items
        ]  # fmt: skip

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        rows = [
            (item.reference["subject"], mark.score)
            for item, mark in zip(items, self.marks(items, answers), strict=True)
        ]
        return with_score(mean_by_kind(rows))
