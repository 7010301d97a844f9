"""easy-VQA: questions about one coloured shape on a plain ground; yes-no and open questions apart.

Source:  vzhou842/easy-VQA, the pictures and questions of its package (htc_vlm.data.easy_vqa).
Differs: ours to ask: a plain lower-case question, one word as answer. Half the questions of the original are yes-no
         and lean to "no", so the overall score flatters; read "open" first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.own import blind_baselines, own_items, score_by_kind, training_questions
from htc_vlm.eval.task import TASKS, Item


@TASKS.register("easy-vqa")
@dataclass(frozen=True)
class EasyVqa:
    name: ClassVar[str] = "easy-vqa"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    max_new_tokens: ClassVar[int] = 4

    def load(self, root: Path, split: str) -> list[Item]:
        """`root` is not used: the pictures ship in a package."""
        return own_items("easy_vqa", split)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        scores = score_by_kind(items, answers)
        for name, wanted in (("yes/no", True), ("open", False)):
            part = [item for item in items if (item.reference.answer in ("yes", "no")) is wanted]
            if part:
                scores[name] = score_by_kind(part, answers)["score"]
        return scores

    def baselines(self, items: Sequence[Item]) -> dict[str, dict[str, float]]:
        """Question only and majority, learnt from the training questions."""
        return blind_baselines(training_questions("easy_vqa"), items)
