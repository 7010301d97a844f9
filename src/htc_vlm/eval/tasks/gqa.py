"""GQA, testdev-balanced: 12578 questions with one short answer each, scored by exact match.

Source:  Hudson and Manning 2019; files from cs.stanford.edu/people/dorarad/gqa/download.html; prompt and reading of
         the answer as in LLaVA-1.5 (scripts/v1_5/eval/gqa.sh, convert_gqa_for_eval.py).
Differs: only accuracy is computed (the official script adds consistency, validity and plausibility, which need more
         answers and files); "binary" and "open" are the official split by structural type.

Files:   gqa/testdev_balanced_questions.json, gqa/images/<imageId>.jpg
Prompt:  <question>\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.score import gqa_match, mean_by_kind
from htc_vlm.eval.task import SHORT, TASKS, Item, percent, picture_at, read_json


@TASKS.register("gqa")
@dataclass(frozen=True)
class Gqa:
    name: ClassVar[str] = "gqa"
    splits: ClassVar[tuple[str, ...]] = ("testdev_balanced",)
    max_new_tokens: ClassVar[int] = 128

    def load(self, root: Path, split: str) -> list[Item]:
        questions = read_json(root / "gqa" / f"{split}_questions.json")
        return [
            Item(question, entry["imageId"], picture_at(root / "gqa" / "images" / f"{entry['imageId']}.jpg"),
                 entry["question"] + SHORT, entry)
            for question, entry in questions.items()
        ]  # fmt: skip

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        rows = [
            ("open" if item.reference["types"]["structural"] == "query" else "binary",
             gqa_match(answers[item.id], item.reference["answer"]))
            for item in items
        ]  # fmt: skip
        means = percent(mean_by_kind(rows))
        return {"score": means.pop("overall")} | means
