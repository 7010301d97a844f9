"""SEED-Bench: multiple choice over pictures (9 dimensions), and over video frames (3 more) if asked for.

Source:  Li et al. 2023; SEED-Bench.json of AILab-CVC; prompt and scoring as in LLaVA-1.5 (scripts/v1_5/eval/seed.sh,
         convert_seed_for_submission.py): the answer must be the letter itself.
Differs: the official leaderboard ranks options by likelihood; LLaVA, and so we, generate the letter.

`subset`: "image" (the default) gives LLaVA-1.5-7B 66.1, "all" with LLaVA's middle video frames 58.6. The paper's 57.9
and 60.3 are of the latter kind, so compare them with subset=all only.

Files:   seed_bench/SEED-Bench.json, SEED-Bench-image/<data_id>; all: SEED-Bench-video-image/<question_id>.png;
         or, below seed_bench/, the parquet files of lmms-lab/SEED-Bench: data/test-*.parquet
Prompt:  <question>\\nA. <choice>\\nB. ...
         Answer with the option's letter from the given choices directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from htc_vlm.eval.blind import Facts
from htc_vlm.eval.hub_files import hub_files, hub_rows, reads_hub
from htc_vlm.eval.score import mean_by_kind
from htc_vlm.eval.task import TASKS, Item, Mark, check_choice, lettered_prompt, percent, picture_at, read_json

# `question_type` of SEED-Bench.json, which the parquet files lack.
_DIMENSIONS = {1: "Scene Understanding", 2: "Instance Identity", 3: "Instance Attributes", 4: "Instance Location",
               5: "Instances Counting", 6: "Spatial Relation", 7: "Instance Interaction", 8: "Visual Reasoning",
               9: "Text Understanding", 10: "Action Recognition", 11: "Action Prediction",
               12: "Procedure Understanding"}  # fmt: skip
_COLUMNS = ("question_id", "data_id", "data_type", "question", "question_type_id", "answer",
            "choice_a", "choice_b", "choice_c", "choice_d")  # fmt: skip


def _picture(folder: Path, entry: Mapping[str, Any]) -> Path:
    if entry["data_type"] == "image":
        return folder / "SEED-Bench-image" / entry["data_id"]
    return folder / "SEED-Bench-video-image" / f"{entry['question_id']}.png"


@TASKS.register("seedbench")
@dataclass(frozen=True)
class SeedBench:
    name: ClassVar[str] = "seedbench"
    splits: ClassVar[tuple[str, ...]] = ("test",)
    max_new_tokens: ClassVar[int] = 128
    layout: ClassVar[str] = (
        "seed_bench/SEED-Bench.json and seed_bench/SEED-Bench-image/*, or, below seed_bench/, lmms-lab/SEED-Bench's "
        "data/test-*.parquet"
    )
    subset: str = "image"

    def __post_init__(self) -> None:
        check_choice("seedbench.subset", self.subset, ("image", "all"))

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "seed_bench"
        files = hub_files(folder, "test")
        if reads_hub(folder / "SEED-Bench.json", files):
            rows = hub_rows(files, _COLUMNS)
            return [
                self._item(entry, str(entry["data_id"]), picture, _DIMENSIONS) for entry, picture in rows if self._takes(entry)
            ]
        official = read_json(folder / "SEED-Bench.json")
        dimensions = {number: name for name, number in official["question_type"].items()}
        return [
            self._item(entry, str(_picture(folder, entry).relative_to(folder)), picture_at(_picture(folder, entry)), dimensions)
            for entry in official["questions"]
            if self._takes(entry)
        ]

    def _takes(self, entry: Mapping[str, Any]) -> bool:
        return self.subset == "all" or entry["data_type"] == "image"

    @staticmethod
    def _item(entry: Mapping[str, Any], image: str, load: Any, dimensions: Mapping[int, str]) -> Item:
        options = {letter: str(entry[f"choice_{letter.lower()}"]) for letter in "ABCD"}
        reference = (dimensions[entry["question_type_id"]], entry["data_type"], entry["answer"], entry["question"], options)
        return Item(str(entry["question_id"]), image, load, lettered_prompt(entry["question"], options), reference)

    def facts(self, item: Item) -> Facts:
        _, _, answer, question, options = item.reference
        return Facts(question, answer, options)

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [Mark(item.id, item.image, answers[item.id].strip() == item.reference[2]) for item in items]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        right = [(item.reference, mark.score) for item, mark in zip(items, self.marks(items, answers), strict=True)]
        means = percent(mean_by_kind((reference[0], is_right) for reference, is_right in right))
        types = percent(mean_by_kind((reference[1], is_right) for reference, is_right in right))
        types.pop("overall")
        return {"score": means.pop("overall")} | types | means
