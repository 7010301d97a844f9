"""MM-Vet: 218 open questions whose answers a GPT-4 judge grades. We write the judge's input, and no score.

Source:  Yu et al. 2023; mm-vet.zip of yuweihao/MM-Vet; prompt and output as in LLaVA-1.5
         (scripts/v1_5/eval/mmvet.sh, convert_mmvet_for_eval.py).
Differs: nothing known. The grade depends on the judge's version, so no score of our own is invented.

Files:   mm-vet/mm-vet.json, mm-vet/images/<imagename>;
         or, below mm-vet/, the parquet files of lmms-lab/MMVet: data/test-*.parquet
Prompt:  the question as it is
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.task import TASKS, Item, picture_at, read_json


@TASKS.register("mmvet")
@dataclass(frozen=True)
class MmVet:
    name: ClassVar[str] = "mmvet"
    splits: ClassVar[tuple[str, ...]] = ("v1",)
    max_new_tokens: ClassVar[int] = 1024
    layout: ClassVar[str] = "mm-vet/mm-vet.json and mm-vet/images/*, or, below mm-vet/, lmms-lab/MMVet's data/test-*.parquet"

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "mm-vet"
        files = hub_files(folder, "test")
        if reads_hub(folder / "mm-vet.json", files):
            return [
                Item(row["question_id"], row["question_id"], picture, row["question"], None)
                for row, picture in hub_rows(files, ["question_id", "question"])
            ]
        return [
            Item(question, entry["imagename"], picture_at(folder / "images" / entry["imagename"]), entry["question"],
                 None)
            for question, entry in read_json(folder / "mm-vet.json").items()
        ]  # fmt: skip

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        """Nothing: upload export.json to the MM-Vet evaluator."""
        return {}

    def export(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, str]:
        """{question id: prediction}, the judge's input."""
        return {item.id: answers[item.id] for item in items}
