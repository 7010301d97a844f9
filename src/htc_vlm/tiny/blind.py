"""What answering without the picture gives: two baselines learned from training questions, and a ceiling without binding.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from htc_vlm.tiny.pictograms import scene
from htc_vlm.tiny.questions import Question
from htc_vlm.tiny.scenes import Scene


# ------------------------------------------------------------------------------------------------ blind baselines
def equals(answer: str, question: Question) -> bool:
    """Is this the question's answer, letter for letter?"""
    return answer == question.answer


IsRight = Callable[[str, Question], bool]


def question_only_baseline(
    train: Iterable[Question], test: Iterable[Question], is_right: IsRight = equals
) -> dict[str, float]:
    """Accuracy by kind of the best answer per exact question text in `train`; unknown texts get the kind's majority."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        by_text[question.text][question.answer] += 1
        by_kind[question.kind][question.answer] += 1
    return _accuracy(test, lambda q: _commonest(by_text.get(q.text) or by_kind[q.kind], q), is_right)


def majority_baseline(
    train: Iterable[Question], test: Iterable[Question], is_right: IsRight = equals
) -> dict[str, float]:
    """Accuracy by kind of the kind's most frequent answer in `train`."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        by_kind[question.kind][question.answer] += 1
    return _accuracy(test, lambda q: _commonest(by_kind[q.kind], q), is_right)


def _commonest(answers: Counter[str], asked: Question) -> str:
    if not answers:
        raise ValueError(f"no training question is of the kind {asked.kind!r}, so {asked.id} has no blind baseline")
    return answers.most_common(1)[0][0]


def _accuracy(test: Iterable[Question], guess: Callable[[Question], str], is_right: IsRight) -> dict[str, float]:
    right: dict[str, list[bool]] = defaultdict(list)
    for question in test:
        right[question.kind].append(is_right(guess(question), question))
    return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def bag_of_things_ceiling(scene: Scene, question: Question) -> float:
    """Expected accuracy of an ideal answerer who knows what is in the picture but not what belongs where or to what.

    It knows each thing's concept, size and turn (bound to each other), the set of tile colours, which cells are taken,
    and the background; not which thing stands in which cell or on which tile. So whole-picture questions (exist, count,
    background) score 1, and so do size and turn of a thing that the question names; name, on, beside 1 / number of
    candidates; the others the share of the best guess. "Which way up" is asked only of things that turn.
    """
    things = scene.things
    if question.kind in ("exist", "count", "background"):
        return 1.0
    if question.kind == "beside":                       # the thing named in the question is not beside itself
        named = any(f"the {thing.concept.label} ?" in question.text for thing in things)
        return 1 / (len(things) - 1) if named else 1 / len(things)
    if question.kind in ("size", "turn") and any(f" {thing.concept.label} " in question.text for thing in things):
        return 1.0
    if question.kind == "turn":
        things = tuple(thing for thing in things if thing.concept.turns)
    values = {
        "name": [thing.concept.label for thing in things],
        "on": [thing.concept.label for thing in things],
        "category": [thing.concept.category for thing in things],
        "where": [str(thing.cell) for thing in things],
        "tile": [thing.tile for thing in things],
        "size": [thing.size for thing in things],
        "turn": [thing.turn for thing in things],
    }[question.kind]
    return max(Counter(values).values()) / len(things)


def ceilings(asked: Iterable[Question]) -> dict[str, float]:
    """Mean `bag_of_things_ceiling` by kind."""
    found: dict[str, list[float]] = defaultdict(list)
    for question in asked:
        found[question.kind].append(bag_of_things_ceiling(scene(question.image), question))
    return {kind: sum(values) / len(values) for kind, values in sorted(found.items())}
