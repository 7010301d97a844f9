"""Photo: new scenes of named cut-outs (test), and photos of other packages that nothing was trained on (photos).

Source:  ours (htc_vlm.tiny.photo). Answers about the photos are judged by words that were written down before any training.
Differs: an answer is compared as a whole, case and a last period apart. What a photo shows, and of which kind it is, is right
         if the answer holds one of the accepted words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from htc_vlm.eval.score import plain_match
from htc_vlm.eval.task import TASKS, Item, Mark
from htc_vlm.eval.tiny_tasks import blind_baselines, own_items, own_marks, score_by_kind, training_questions
from htc_vlm.tiny import photo
from htc_vlm.tiny.questions import Question, words


def is_right(answer: str, question: Question) -> bool:
    """By the accepted words of a photo, else as a whole."""
    accepted = photo.accepted(question)
    if not accepted:
        return plain_match(answer, question.answer)
    return any(f" {words(word)} " in f" {words(answer)} " for word in accepted)


@TASKS.register("photo")
@dataclass(frozen=True)
class Photo:
    name: ClassVar[str] = "photo"
    splits: ClassVar[tuple[str, ...]] = ("test", "photos", "val")
    max_new_tokens: ClassVar[int] = 12

    def load(self, root: Path, split: str) -> list[Item]:
        """`root` is not used: htc_vlm.tiny.photo finds the files below HTC_VLM_DATA (which --data sets)."""
        return own_items("photo", split)

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return own_marks(items, answers, is_right)

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        return score_by_kind(items, answers, is_right)

    def baselines(self, items: Sequence[Item]) -> dict[str, dict[str, float]]:
        """Question only and majority, learnt from the training questions."""
        return blind_baselines(training_questions("photo"), items, is_right)
