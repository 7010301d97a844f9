"""What our own three sets share as tasks: one plain word as answer, scores by kind of question, blind baselines.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from math import fsum

from htc_vlm.eval.score import mean_by_kind, plain_match
from htc_vlm.eval.task import Item, Mark, percent, with_score
from htc_vlm.tiny.blind import equals, majority_baseline, question_only_baseline
from htc_vlm.tiny.questions import Question


def own_items(module: str, split: str) -> list[Item]:
    """The fixed questions of htc_vlm.data.<module>, as items; the reference is the Question itself."""
    dataset = import_module(f"htc_vlm.tiny.{module}")
    return [
        Item(question.id, question.image, partial(dataset.picture, question.image), question.text, question)
        for question in dataset.questions(split)
    ]


def exact(answer: str, question: Question) -> float:
    """1 for an exact match."""
    return plain_match(answer, question.answer)


Judge = Callable[[str, Question], float]


def own_marks(items: Sequence[Item], answers: Mapping[str, str], judge: Judge = exact) -> list[Mark]:
    """What each answer is worth."""
    return [Mark(item.id, item.image, float(judge(answers[item.id], item.reference))) for item in items]


def score_by_kind(items: Sequence[Item], answers: Mapping[str, str], judge: Judge = exact) -> dict[str, float]:
    """{"score": overall, kind: ...} in percent."""
    return with_score(mean_by_kind((item.reference.kind, judge(answers[item.id], item.reference)) for item in items))


def weighted(by_kind: Mapping[str, float], items: Sequence[Item]) -> dict[str, float]:
    """{kind: share} -> {"score": mean over the items' kinds, kind: ...} in percent."""
    kinds = [item.reference.kind for item in items]
    return {"score": 100 * fsum(by_kind[kind] for kind in kinds) / len(kinds)} | percent(by_kind)


def training_questions(module: str) -> list[Question]:
    """The fixed training questions of htc_vlm.data.<module>."""
    questions: list[Question] = import_module(f"htc_vlm.tiny.{module}").questions("train")
    return questions


def blind_baselines(
    train: Iterable[Question], items: Sequence[Item], is_right: Callable[[str, Question], bool] = equals
) -> dict[str, dict[str, float]]:
    """What answering without the picture gives on these items, in percent: by question text, and by kind alone.

    is_right(answer, question): as the task judges its answers.
    """
    train, asked = list(train), [item.reference for item in items]
    return {
        "question only": weighted(question_only_baseline(train, asked, is_right), items),
        "majority": weighted(majority_baseline(train, asked, is_right), items),
    }
