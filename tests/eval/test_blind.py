"""What answering blind scores, worked out by hand on the miniatures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from htc_vlm.eval.blind import Facts, question_only
from htc_vlm.eval.run import run_task
from htc_vlm.eval.task import Item

from . import miniatures
from .conftest import FakeAnswerer


def test_always_yes_has_an_f1_of_two_thirds_in_pope(tmp_path: Path) -> None:
    """Random weights that say "yes" score 66.67, which looks like a result. Half of each setting's labels are yes."""
    said = miniatures.pope(tmp_path)
    baselines = run_task(FakeAnswerer(said), "pope", tmp_path / "out", root=tmp_path)["baselines"]
    assert baselines["always yes"]["score"] == pytest.approx(200 / 3)
    assert baselines["always yes"]["accuracy"] == 50 and baselines["always yes"]["yes_ratio"] == 100
    assert set(baselines) == {"always yes", "majority", "question only"}


@pytest.mark.parametrize(
    ("name", "always", "score", "majority"),
    [
        ("mme", "always yes", 500, 500),  # ten subtasks: 50 for questions, nothing for pictures
        ("gqa", "always yes", 200 / 12, 300 / 12),  # yes is right twice, left three times
        ("scienceqa", "always A", 50, 50),  # A in 5 of 10
        ("seedbench", "always A", 60, 60),  # A in 6 of 10
        ("mmbench", "always A", 0, 0),  # a letter is right in one rotation only
    ],
)  # fmt: skip
def test_constants_score_what_their_share_is(name: str, always: str, score: float, majority: float, tmp_path: Path) -> None:
    """Prevents an official score without what a constant gives."""
    vars(miniatures)[name](tmp_path)
    baselines = run_task(FakeAnswerer(), name, tmp_path / "out", root=tmp_path)["baselines"]
    assert baselines[always]["score"] == pytest.approx(score)
    assert baselines["majority"]["score"] == pytest.approx(majority)


def test_a_question_is_not_answered_from_its_own_picture() -> None:
    """Otherwise "question only" would know the right answer. Of options their text counts, not their letter."""
    items = [Item(str(i), f"p{i}", lambda: Image.new("RGB", (1, 1)), "?", None) for i in range(3)]
    open_ended = [Facts("?", "red"), Facts("?", "blue"), Facts("?", "blue")]
    assert question_only(items, open_ended, "no")[0] == "blue"  # one red and one blue are left for the other two
    lettered = [
        Facts("?", "A", {"A": "cat", "B": "dog"}),
        Facts("?", "B", {"A": "dog", "B": "cat"}),
        Facts("!", "B", {"A": "cat", "B": "dog"}),
    ]
    assert question_only(items, lettered, "A") == ["A", "B", "A"]


def test_without_a_score_there_are_no_baselines(tmp_path: Path) -> None:
    """MM-Vet's judge scores; VQAv2 test-dev's server does."""
    miniatures.mmvet(tmp_path)
    assert run_task(FakeAnswerer(), "mmvet", tmp_path / "out", root=tmp_path)["baselines"] == {}
