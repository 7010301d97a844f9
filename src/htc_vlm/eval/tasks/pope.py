"""POPE on COCO: "Is there a ... in the image?" with random, popular and adversarial absent objects.

Source:  Li et al. 2023; output/coco/coco_pope_*.json of AoiDragon/POPE; prompt and scorer as in LLaVA-1.5
         (llava_pope_test.jsonl, eval_pope.py, itself the official evaluate.py).
Differs: answers are joined to labels by question id, not by line order (POPE#17). LLaVA's own question file leaves
         out 90 of the 3000 random questions; here every question of the file counts.

`headline`: the mean F1 over the three settings is what LLaVA reports (85.9, the uncompressed row of the paper's
Table 2) and the default; "accuracy" is the mean accuracy. Both are always shown, for each setting too.

Files:   pope/coco/coco_pope_{random,popular,adversarial}.json (JSON lines), pope/val2014/*.jpg
Prompt:  <question>\\nAnswer the question using a single word or phrase.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from htc_vlm.eval.score import pope_metrics
from htc_vlm.eval.task import SHORT, TASKS, Item, check_choice, percent, picture_at

SETTINGS = ("random", "popular", "adversarial")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"official file missing: {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@TASKS.register("pope")
@dataclass(frozen=True)
class Pope:
    name: ClassVar[str] = "pope"
    splits: ClassVar[tuple[str, ...]] = ("all", *SETTINGS)
    max_new_tokens: ClassVar[int] = 128
    headline: str = "f1"

    def __post_init__(self) -> None:
        check_choice("pope.headline", self.headline, ("f1", "accuracy"))

    def load(self, root: Path, split: str) -> list[Item]:
        return [
            Item(f"{setting}/{entry['question_id']}", entry["image"],
                 picture_at(root / "pope" / "val2014" / entry["image"]), entry["text"] + SHORT,
                 (setting, entry["label"]))
            for setting in (SETTINGS if split == "all" else (split,))
            for entry in _lines(root / "pope" / "coco" / f"coco_pope_{setting}.json")
        ]  # fmt: skip

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        by_setting = {
            setting: percent(pope_metrics(
                (answers[item.id], item.reference[1]) for item in items if item.reference[0] == setting
            ))
            for setting in dict.fromkeys(item.reference[0] for item in items)
        }  # fmt: skip
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        means = {name: sum(shares[name] for shares in by_setting.values()) / len(by_setting) for name in names}
        single = {f"{setting} {name}": shares[name] for setting, shares in by_setting.items() for name in names}
        return {"score": means[self.headline]} | means | single
