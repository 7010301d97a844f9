"""Scores of answering without the picture: beside each official score, what it is worth.

Source:  Goyal et al. 2017 (VQA v2) and Li et al. 2023 (POPE), whose balance these baselines show.
Differs: official files bring no training questions, so "majority" and "question only" learn from the asked questions
         themselves: the latter from those about other pictures only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from htc_vlm.eval.task import Item, Task


@dataclass(frozen=True)
class Facts:
    """What a blind guesser may know of a question: its text, its usual right answer, and its options by letter."""

    question: str
    answer: str
    options: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class HasFacts(Protocol):
    """A task whose questions can be guessed blind."""

    def facts(self, item: Item) -> Facts: ...


def blind_baselines(task: Task, items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """Metrics of three blind guessers: a constant ("always yes" or "always A"), the commonest right answer, and the
    commonest right answer to the same question about other pictures. {} for tasks without a score."""
    if not isinstance(task, HasFacts):
        return {}
    facts = [task.facts(item) for item in items]
    majority = Counter(fact.answer for fact in facts).most_common(1)[0][0]
    constants = {"majority": majority}
    if all(fact.options for fact in facts):
        constants = {"always A": "A", **constants}
    elif any(fact.answer == "yes" for fact in facts):
        constants = {"always yes": "yes", **constants}
    guesses = {name: [text] * len(items) for name, text in constants.items()}
    guesses["question only"] = question_only(items, facts, majority)
    scored = {
        name: task.score(items, {item.id: text for item, text in zip(items, texts, strict=True)})
        for name, texts in guesses.items()
    }
    return {name: metrics for name, metrics in scored.items() if metrics}


def question_only(items: Sequence[Item], facts: Sequence[Facts], fallback: str) -> list[str]:
    """For each item the commonest right answer (of several options: text) to its question about other pictures.

    >>> items = [Item(str(i), f"p{i // 2}", lambda: None, "?", None) for i in range(4)]
    >>> question_only(items, [Facts("?", "red"), Facts("?", "red"), Facts("?", "blue"), Facts("!", "one")], "red")
    ['blue', 'blue', 'red', 'red']
    """
    everywhere: dict[str, Counter[str]] = defaultdict(Counter)
    here: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for item, fact in zip(items, facts, strict=True):
        text = fact.options.get(fact.answer, fact.answer)
        everywhere[fact.question][text] += 1
        here[fact.question, item.image][text] += 1
    guesses = []
    for item, fact in zip(items, facts, strict=True):
        others = everywhere[fact.question] - here[fact.question, item.image]
        if fact.options:
            best = max(fact.options, key=lambda letter, fact=fact, others=others: others[fact.options[letter]])  # type: ignore[misc]
            guesses.append(best if others[fact.options[best]] else fallback)
        else:
            guesses.append(others.most_common(1)[0][0] if others else fallback)
    return guesses
