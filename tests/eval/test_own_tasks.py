"""Our own three sets as tasks: kinds apart, yes-no and open apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from htc_vlm.eval.run import run_task
from htc_vlm.eval.task import Item, find_tasks, make_task
from htc_vlm.eval.tiny_tasks import score_by_kind

from .conftest import FakeAnswerer


def _items(*questions: tuple[str, str]) -> list[Item]:
    return [
        Item(f"q{i}", "p", lambda: None, f"question {i} ?", SimpleNamespace(kind=kind, answer=answer))  # type: ignore[arg-type,return-value]
        for i, (kind, answer) in enumerate(questions)
    ]


def test_our_sets_are_tasks() -> None:
    """Prevents a set that can be trained on but not evaluated."""
    assert {"pictograms", "easy-vqa", "fashion-mnist"} <= set(find_tasks().names())


def test_yes_no_and_open_questions_stand_apart() -> None:
    """2 of 3 yes-no and 1 of 2 open: 60 overall. Prevents yes-no luck from hiding behind one number."""
    items = _items(("open", "red"), ("open", "circle"), ("yes/no", "yes"), ("yes/no", "no"), ("yes/no", "no"))
    answers = dict(zip(("q0", "q1", "q2", "q3", "q4"), ("red", "square", "yes", "yes", "No."), strict=True))
    scores = make_task("easy-vqa").score(items, answers)
    assert scores == pytest.approx({"score": 60, "open": 50, "yes/no": 200 / 3})


def test_kinds_are_scored_in_percent() -> None:
    """3 of 4: a 2 of 2, b 1 of 2. Prevents shares among percentages."""
    items = _items(("a", "cat"), ("a", "dog"), ("b", "top"), ("b", "two"))
    said = {"q0": "cat", "q1": "Dog", "q2": "bottom", "q3": "two"}
    assert score_by_kind(items, said) == {"score": 75, "a": 100, "b": 50}


def test_pictograms_show_what_blind_and_unbound_answering_gives(tmp_path: Path) -> None:
    """120 real questions, all answered "yes". Prevents a score without its baselines."""
    result = run_task(FakeAnswerer(), "pictograms", tmp_path, limit=120)
    assert set(result["baselines"]) == {"question only", "majority", "bag of things"}
    asked = make_task("pictograms").load(tmp_path, "test")[:120]
    n_yes = sum(item.reference.answer == "yes" for item in asked)
    assert result["metrics"]["score"] == pytest.approx(100 * n_yes / 120)
    bag = result["baselines"]["bag of things"]
    assert bag["count"] == bag["exist"] == bag["background"] == 100 and bag["name"] < 100
    assert result["baselines"]["question only"]["score"] < bag["score"]


def test_the_unseen_vendor_is_a_split_of_its_own(tmp_path: Path) -> None:
    """Prevents seen styles from standing for unseen ones."""
    task = make_task("pictograms")
    seen, unseen = task.load(tmp_path, "test"), task.load(tmp_path, "test-unseen")
    assert not {item.id for item in seen} & {item.id for item in unseen}
    assert not {item.image for item in seen} & {item.image for item in unseen}
