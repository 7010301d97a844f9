"""GQA, testdev-balanced: 12578 questions with one short answer each, scored by exact match.

Source:  Hudson and Manning 2019; files from cs.stanford.edu/people/dorarad/gqa/download.html; prompt and reading of
         the answer as in LLaVA-1.5 (scripts/v1_5/eval/gqa.sh, convert_gqa_for_eval.py).
Differs: only accuracy is computed (the official script adds consistency, validity and plausibility, which need more
         answers and files); "binary" and "open" are the official split by structural type.

Files:   gqa/testdev_balanced_questions.json, gqa/images/<imageId>.jpg; or, below gqa/, the parquet files of lmms-lab/GQA:
         testdev_balanced_instructions/testdev-*.parquet, testdev_balanced_images/testdev-*.parquet
Prompt:  <question>\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.score import gqa_match, mean_by_kind
from htc_vlm.eval.task import SHORT, TASKS, Item, Mark, picture_at, read_json, with_score


@TASKS.register("gqa")
@dataclass(frozen=True)
class Gqa:
    name: ClassVar[str] = "gqa"
    splits: ClassVar[tuple[str, ...]] = ("testdev_balanced",)
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "gqa/testdev_balanced_questions.json and gqa/images/*.jpg, or, below gqa/, lmms-lab/GQA's "
        "testdev_balanced_instructions/testdev-*.parquet and testdev_balanced_images/testdev-*.parquet"
    )

    def load(self, root: Path, split: str) -> list[Item]:
        official = root / "gqa" / f"{split}_questions.json"
        asked = hub_files(root / "gqa" / "testdev_balanced_instructions", "testdev")
        if reads_hub(official, asked):
            shown = hub_files(root / "gqa" / "testdev_balanced_images", "testdev")
            return self._from_hub(asked, shown)
        questions = read_json(official)
        return [
            Item(question, entry["imageId"], picture_at(root / "gqa" / "images" / f"{entry['imageId']}.jpg"),
                 entry["question"] + SHORT, entry)
            for question, entry in questions.items()
        ]  # fmt: skip

    @staticmethod
    def _from_hub(asked: Sequence[Path], shown: Sequence[Path]) -> list[Item]:
        if not shown:
            raise FileNotFoundError("official file missing: testdev_balanced_images/testdev-*.parquet beside the instructions")
        pictures = {row["id"]: picture for row, picture in hub_rows(shown, ["id"])}
        rows = [row for row, _ in hub_rows(asked, ["id", "imageId", "question", "answer", "types"])]
        missing = sorted({row["imageId"] for row in rows} - set(pictures))
        if missing:
            raise FileNotFoundError(f"{len(missing)} pictures are missing in {shown[0].parent}: {', '.join(missing[:5])}")
        return [Item(row["id"], row["imageId"], pictures[row["imageId"]], row["question"] + SHORT, row) for row in rows]

    def facts(self, item: Item) -> Facts:
        return Facts(item.reference["question"], item.reference["answer"])

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [Mark(item.id, item.image, gqa_match(answers[item.id], item.reference["answer"])) for item in items]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        rows = [
            ("open" if item.reference["types"]["structural"] == "query" else "binary",
             mark.score)
            for item, mark in zip(items, self.marks(items, answers), strict=True)
        ]  # fmt: skip
        return with_score(mean_by_kind(rows))
