"""Pictograms: scenes of pictograms, asked about by kind; drawing styles seen (test) and an unseen vendor (test-unseen).

Source:  ours (htc_vlm.data.pictograms); the bag-of-things ceiling is the lesson of specs/feasibility.md: a model that
         knows which things are in a scene, but not which is where, scores this much.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.own import own_items, score_by_kind
from htc_vlm.eval.task import TASKS, Item


@TASKS.register("pictograms")
@dataclass(frozen=True)
class Pictograms:
    name: ClassVar[str] = "pictograms"
    splits: ClassVar[tuple[str, ...]] = ("test", "test-unseen", "val")
    max_new_tokens: ClassVar[int] = 4

    def load(self, root: Path, split: str) -> list[Item]:
        """`root` is not used: the atlas ships with this package."""
        return own_items("pictograms", split)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        return score_by_kind(items, answers)
