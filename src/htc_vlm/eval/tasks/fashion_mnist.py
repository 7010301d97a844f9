"""Fashion-MNIST as questions: what piece of clothing a small grey picture shows.

Source:  Xiao et al. 2017, the pictures as htc_vlm.tiny.fashion_mnist ships them.
Differs: ours to ask: a plain lower-case question, one word as answer; exact match by kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.task import TASKS, Item, Mark
from htc_vlm.eval.tiny_tasks import blind_baselines, own_items, own_marks, score_by_kind, training_questions


@TASKS.register("fashion-mnist")
@dataclass(frozen=True)
class FashionMnist:
    name: ClassVar[str] = "fashion-mnist"
    splits: ClassVar[tuple[str, ...]] = ("test", "val")
    max_new_tokens: ClassVar[int] = 4

    def load(self, root: Path, split: str) -> list[Item]:
        """`root` is not used: htc_vlm.tiny.fashion_mnist finds the files, or HTC_VLM_DATA (which --data sets)."""
        return own_items("fashion_mnist", split)

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return own_marks(items, answers)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        return score_by_kind(items, answers)

    def baselines(self, items: Sequence[Item]) -> dict[str, dict[str, float]]:
        """Question only and majority, learnt from the training questions."""
        return blind_baselines(training_questions("fashion_mnist"), items)
