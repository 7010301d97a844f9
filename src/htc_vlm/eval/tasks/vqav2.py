"""VQAv2: val with its ten human answers, and test-dev as an upload for the evaluation server.

Source:  Goyal et al. 2017; files from visualqa.org/download.html; prompt and upload as in LLaVA-1.5
         (scripts/v1_5/eval/vqav2.sh, convert_vqav2_for_submission.py).
Differs: the paper's numbers are test-dev, which only the server can score: `test-dev` gives export.json and no score.
         `val` is scored here by the official rule; it is not comparable with test-dev (LLaVA trains on VQAv2 train).
         A question without an answer is an error; LLaVA's converter uploads an empty string for it.

Files:   vqav2/v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/*.jpg;
         vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json, test2015/*.jpg;
         or, below vqav2/, the parquet files of lmms-lab/VQAv2: data/{validation,testdev}-*.parquet
Prompt:  <question>\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.score import mean_by_kind, normalize_evalai_answer, vqa_accuracy
from htc_vlm.eval.task import SHORT, TASKS, Item, Mark, commonest, picture_at, read_json, with_score

_QUESTIONS = {"val": "v2_OpenEnded_mscoco_val2014_questions.json",
              "test-dev": "v2_OpenEnded_mscoco_test-dev2015_questions.json"}  # fmt: skip
_HUB_SPLITS = {"val": "validation", "test-dev": "testdev"}
_PICTURES = {"val": "val2014/COCO_val2014_{:012d}.jpg", "test-dev": "test2015/COCO_test2015_{:012d}.jpg"}


@TASKS.register("vqav2")
@dataclass(frozen=True)
class VqaV2:
    name: ClassVar[str] = "vqav2"
    splits: ClassVar[tuple[str, ...]] = ("val", "test-dev")
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json, vqav2/v2_mscoco_val2014_annotations.json and vqav2/val2014/*.jpg "
        "(test-dev: v2_OpenEnded_mscoco_test-dev2015_questions.json, test2015/*.jpg), or, below vqav2/, lmms-lab/VQAv2's "
        "data/{validation,testdev}-*.parquet"
    )

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "vqav2"
        files = hub_files(folder, _HUB_SPLITS[split])
        if reads_hub(folder / _QUESTIONS[split], files):
            return self._from_hub(files, split)
        questions = read_json(folder / _QUESTIONS[split])["questions"]
        annotations = self._annotations(folder, questions) if split == "val" else {}
        return [
            Item(str(entry["question_id"]), str(entry["image_id"]),
                 picture_at(folder / _PICTURES[split].format(entry["image_id"])),
                 entry["question"] + SHORT, annotations.get(entry["question_id"]))
            for entry in questions
        ]  # fmt: skip

    @staticmethod
    def _from_hub(files: Sequence[Path], split: str) -> list[Item]:
        scored = ["answers", "answer_type"] if split == "val" else []
        return [
            Item(str(row["question_id"]), str(row["image_id"]), picture, row["question"] + SHORT, row if scored else None)
            for row, picture in hub_rows(files, ["question_id", "image_id", "question", *scored])
        ]

    @staticmethod
    def _annotations(folder: Path, questions: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        annotations = {
            entry["question_id"]: entry
            for entry in read_json(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
        }
        missing = [str(entry["question_id"]) for entry in questions if entry["question_id"] not in annotations]
        if missing:
            raise ValueError(f"VQAv2 val: {len(missing)} questions have no annotation: {', '.join(missing[:10])}")
        return annotations

    def facts(self, item: Item) -> Facts:
        humans = [] if item.reference is None else [human["answer"] for human in item.reference["answers"]]
        return Facts(item.prompt, commonest(humans))

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        """None for test-dev, whose answers are not public."""
        return [
            Mark(item.id, item.image, vqa_accuracy(answers[item.id], [human["answer"] for human in item.reference["answers"]]))
            for item in items
            if item.reference is not None
        ]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        if items[0].reference is None:
            return {}  # test-dev: the server scores export.json
        rows = [
            (item.reference["answer_type"], mark.score)
            for item, mark in zip(items, self.marks(items, answers), strict=True)
        ]
        return with_score(mean_by_kind(rows))

    def export(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The server's format, answers normalised as LLaVA normalises them before upload."""
        return [
            {"question_id": int(item.id), "answer": normalize_evalai_answer(answers[item.id])} for item in items
        ]
