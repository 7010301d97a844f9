"""Questions in, answers out: batches, one picture asked many times, and unknown words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from htc_vlm.data.images import ImageError, load_for_model
from htc_vlm.model.answering import Answerer

from .. import tiny_runs as tiny

QUESTIONS = [*tiny.QUESTIONS, "what colour is behind the bottom left ?"]
METHODS = {"none": tiny.NONE, "voco": tiny.VOCO, "htc": tiny.HTC}


@dataclass(frozen=True)
class Ask:
    """A picture and its questions."""

    image_key: str
    load_image: Callable[[], Image.Image]
    questions: list[str]


def answerer(method: str) -> Answerer:
    return Answerer(*tiny.loaded(METHODS[method]))


def one_by_one(method: str, picture: Image.Image, question: str) -> str:
    """The answer without any of our short cuts: processor, generate, decode."""
    model, processor = tiny.loaded(METHODS[method])
    inputs = processor(images=[picture], text=f"<image>{question} ", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_batch_answers_as_each_question_alone(method: str) -> None:
    """Left padding, shared pictures and the order of answers: three pictures with 2, 1 and 3 questions."""
    pictures = [tiny.noise(i) for i in range(3)]
    questions = [QUESTIONS[:2], QUESTIONS[2:], QUESTIONS]
    asks = [Ask(str(i), lambda p=p: p, q) for i, (p, q) in enumerate(zip(pictures, questions, strict=True))]  # type: ignore[misc]
    got = answerer(method).answer_batch(asks, 3)
    assert got == [[one_by_one(method, p, q) for q in row] for p, row in zip(pictures, questions, strict=True)]
    assert len({answer for row in got for answer in row}) > 1


@pytest.mark.parametrize("method", ["none", "htc"])
def test_a_picture_is_loaded_once_for_all_its_questions(method: str) -> None:
    """And a new key brings the new picture, not the cells of the last one."""
    loads: list[str] = []
    one = answerer(method)

    def loader(name: str, seed: int) -> Callable[[], Image.Image]:
        return lambda: loads.append(name) or tiny.noise(seed)  # type: ignore[func-returns-value]

    answers = [one.answer(name, loader(name, seed), [q], 3) for name, seed in (("a", 0), ("b", 1)) for q in QUESTIONS[:2]]
    assert loads == ["a", "b"]
    assert answers == [[one_by_one(method, tiny.noise(seed), q)] for seed in (0, 1) for q in QUESTIONS[:2]]


def test_unknown_words_are_found_and_known_ones_are_not() -> None:
    """Upper case and punctuation are no reason to warn; sub-word tokenizers know every word."""
    one = answerer("htc")
    assert one.unknown_words("What is at the top left ?") == []
    assert one.unknown_words("is the zeppelin up ?")[0] == "zeppelin"

    class SubWords:
        tokenizer: Any = type("Tokenizer", (), {"unk_token_id": None})()

    assert Answerer(one.model, SubWords()).unknown_words("zeppelin") == []  # type: ignore[arg-type]


def test_a_thin_picture_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    """60000 x 1 is small, its padded square has 3.6 billion pixels: 10 GB, and the process was killed."""
    Image.new("RGB", (60_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(ImageError, match="thin.png: 60000 x 1 pixels, padded to a square, exceed"):
        load_for_model(tmp_path / "thin.png")
    assert load_for_model(tmp_path / "thin.png", max_pixels=60_000**2).size == (60_000, 1)


@pytest.mark.parametrize("n_questions", [1, 4])
def test_a_static_cache_gives_the_same_answers(n_questions: int) -> None:
    """One picture asked often, and several pictures."""
    model, processor = tiny.loaded(METHODS["htc"])
    dynamic, static = Answerer(model, processor), Answerer(model, processor, cache="static")
    questions = (QUESTIONS * 2)[:n_questions]
    cells = dynamic.encode([tiny.noise(i) for i in range(2)])
    for which in ([1] * n_questions, [i % 2 for i in range(n_questions)]):
        assert static.ask(cells, which, questions, 3) == dynamic.ask(cells, which, questions, 3)
