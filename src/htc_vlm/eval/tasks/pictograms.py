"""Pictograms: scenes of pictograms, by kind of question; styles seen in training (test), unseen vendor (test-unseen).

Source:  ours (htc_vlm.tiny.pictograms); the bag-of-things ceiling is the lesson of docs/specs/feasibility.md: a model that
         knows which things are in a scene, but not which is where, scores this much.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.task import TASKS, Item, Mark
from htc_vlm.eval.tiny_tasks import blind_baselines, own_items, own_marks, score_by_kind, weighted
from htc_vlm.tiny import blind, pictograms

N_TRAIN_SCENES = 2000  # what the blind baselines learn from, twelve questions each


@TASKS.register("pictograms")
@dataclass(frozen=True)
class Pictograms:
    name: ClassVar[str] = "pictograms"
    splits: ClassVar[tuple[str, ...]] = ("test", "test-unseen", "val")
    max_new_tokens: ClassVar[int] = 4

    def load(self, root: Path, split: str) -> list[Item]:
        """`root` is not used: the atlas ships with this package."""
        return own_items("pictograms", split)

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return own_marks(items, answers)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        return score_by_kind(items, answers)

    def baselines(self, items: Sequence[Item]) -> dict[str, dict[str, float]]:
        """Question only, majority, and what knowing which things, but not where, would give: "bag of things"."""
        scenes = pictograms.images("train")[:N_TRAIN_SCENES]
        train = [question for scene in scenes for question in pictograms.sample_questions(scene, 12, seed=0, paired=False)]
        ceiling = weighted(blind.ceilings(item.reference for item in items), items)
        return blind_baselines(train, items) | {"bag of things": ceiling}
