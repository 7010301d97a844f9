"""easy-VQA: questions about one coloured shape on a plain ground; yes-no and open questions apart.

Source:  vzhou842/easy-VQA, the pictures and questions of its package (htc_vlm.tiny.easy_vqa).
Differs: answers are single words, compared after lower case. Read "open" first: the question's text alone answers
         82.5 % of the official test's yes-no questions (see the baselines), but 22.6 % of the open ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.task import TASKS, Item, Mark
from htc_vlm.eval.tiny_tasks import blind_baselines, own_items, own_marks, score_by_kind, training_questions


@TASKS.register("easy-vqa")
@dataclass(frozen=True)
class EasyVqa:
    name: ClassVar[str] = "easy-vqa"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    max_new_tokens: ClassVar[int] = 4

    def load(self, root: Path, split: str) -> list[Item]:
        """`root` is not used: htc_vlm.tiny.easy_vqa finds the package, or HTC_VLM_DATA (which --data sets)."""
        return own_items("easy_vqa", split)

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return own_marks(items, answers)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        """The kinds are "open" and "yes/no"."""
        return score_by_kind(items, answers)

    def baselines(self, items: Sequence[Item]) -> dict[str, dict[str, float]]:
        """Question only and majority, learnt from the training questions."""
        return blind_baselines(training_questions("easy_vqa"), items)
