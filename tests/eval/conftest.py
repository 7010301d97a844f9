"""A fake answerer and a two-picture task, so that the runner is tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from htc_vlm.eval.score import mean_by_kind, plain_match
from htc_vlm.eval.task import Item, Mark, percent


@dataclass
class FakeAnswerer:
    """Answers from a table {prompt: answer} (or "yes"), counts what it was asked, can die after N questions."""

    table: Mapping[str, str] = field(default_factory=dict)
    dies_after: int | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def answer(
        self, image_key: str, load_image: Callable[[], Image.Image], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt("killed")
        picture = load_image()
        assert picture.mode == "RGB"
        self.opened.append(image_key)
        self.asked += [(image_key, question) for question in questions]
        return [self.table.get(question, "yes") for question in questions]


@dataclass(frozen=True)
class Colours:
    """Six questions about three pictures; q0 and q5 share a picture although they are apart in the fixed order."""

    name: ClassVar[str] = "colours"
    splits: ClassVar[tuple[str, ...]] = ("test",)
    max_new_tokens: ClassVar[int] = 4
    strict: bool = True

    def load(self, root: Path, split: str) -> list[Item]:
        images = ["p0", "p1", "p1", "p2", "p2", "p0"]
        return [
            Item(f"q{i}", image, lambda: Image.new("RGB", (2, 2)), f"question {i} ?", (["even", "odd"][i % 2], "yes"))
            for i, image in enumerate(images)
        ]

    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [Mark(item.id, item.image, plain_match(answers[item.id], item.reference[1])) for item in items]

    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        rows = [(item.reference[0], plain_match(answers[item.id], item.reference[1])) for item in items]
        means = percent(mean_by_kind(rows))
        return {"score": means.pop("overall")} | means


@pytest.fixture
def colours() -> Colours:
    return Colours()
