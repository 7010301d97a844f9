"""What our own three sets share as tasks: questions with one plain word as answer, grouped by kind.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module

from htc_vlm.eval.score import mean_by_kind, plain_match
from htc_vlm.eval.task import Item, percent


def own_items(module: str, split: str) -> list[Item]:
    """The fixed questions of htc_vlm.data.<module>, as items; the reference is the Question itself."""
    dataset = import_module(f"htc_vlm.data.{module}")
    return [
        Item(question.id, question.image, partial(dataset.picture, question.image), question.text, question)
        for question in dataset.questions(split)
    ]


def score_by_kind(items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
    """{"score": overall, kind: ...} in percent, by exact match."""
    rows = [(item.reference.kind, plain_match(answers[item.id], item.reference.answer)) for item in items]
    means = percent(mean_by_kind(rows))
    return {"score": means.pop("overall")} | means
