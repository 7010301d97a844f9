"""SEED-Bench: multiple choice over pictures (9 dimensions), and over video frames (3 more) if asked for.

Source:  Li et al. 2023; SEED-Bench.json of AILab-CVC; prompt and scoring as in LLaVA-1.5 (scripts/v1_5/eval/seed.sh,
         convert_seed_for_submission.py): the answer must be the letter itself.
Differs: the official leaderboard ranks options by likelihood; LLaVA, and so we, generate the letter.

`subset`: "image" (the default) gives LLaVA-1.5-7B 66.1, "all" with LLaVA's middle video frames 58.6. The paper's 57.9
and 60.3 are of the latter kind, so compare them with subset=all only.

Files:   seed_bench/SEED-Bench.json, SEED-Bench-image/<data_id>; all: SEED-Bench-video-image/<question_id>.png
Prompt:  <question>\\nA. <choice>\\nB. ...
         Answer with the option's letter from the given choices directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from htc_vlm.eval.score import mean_by_kind
from htc_vlm.eval.task import TASKS, Item, check_choice, lettered_prompt, percent, picture_at, read_json


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
    subset: str = "image"

    def __post_init__(self) -> None:
        check_choice("seedbench.subset", self.subset, ("image", "all"))

    def load(self, root: Path, split: str) -> list[Item]:
        folder = root / "seed_bench"
        official = read_json(folder / "SEED-Bench.json")
        dimensions = {number: name for name, number in official["question_type"].items()}
        return [
            Item(str(entry["question_id"]), str(_picture(folder, entry).relative_to(folder)),
                 picture_at(_picture(folder, entry)),
                 lettered_prompt(entry["question"], {letter: entry[f"choice_{letter.lower()}"] for letter in "ABCD"}),
                 (dimensions[entry["question_type_id"]], entry["data_type"], entry["answer"]))
            for entry in official["questions"]
            if self.subset == "all" or entry["data_type"] == "image"
        ]  # fmt: skip

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        right = [(item.reference, answers[item.id].strip() == item.reference[2]) for item in items]
        means = percent(mean_by_kind((dimension, is_right) for (dimension, _, _), is_right in right))
        types = percent(mean_by_kind((data_type, is_right) for (_, data_type, _), is_right in right))
        types.pop("overall")
        return {"score": means.pop("overall")} | types | means
