"""The runner: restart after a kill, and every way in which an answers file can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from htc_vlm.eval import run_info
from htc_vlm.eval.answers import AnswersError
from htc_vlm.eval.run import Ask, rescore, run_task
from htc_vlm.eval.task import Item, Mark
from tests import processes

from .conftest import Colours, FakeAnswerer


def _file(output: Path) -> Path:
    return output / "colours-test" / "answers.jsonl"


def test_questions_of_one_picture_are_asked_together(colours: Colours, tmp_path: Path) -> None:
    """Prevents re-encoding a picture for each of its questions."""
    fake = FakeAnswerer()
    run_task(fake, colours, tmp_path)
    assert fake.opened == ["p0", "p1", "p2"]
    assert len(fake.asked) == 6


def test_the_score_is_over_all_questions_and_by_kind(colours: Colours, tmp_path: Path) -> None:
    """Four of six right: question 0 (even) and 3 (odd) are answered wrongly."""
    fake = FakeAnswerer({"question 0 ?": "no", "question 3 ?": "blue"})
    result = run_task(fake, colours, tmp_path, seed=7, device="cpu", config={"model": "fake"})
    assert result["metrics"] == pytest.approx({"score": 400 / 6, "even": 200 / 3, "odd": 200 / 3})
    saved = json.loads((tmp_path / "colours-test" / "result.json").read_text())
    assert saved["metrics"] == pytest.approx(result["metrics"])
    kept = {"answers_sha256", "config", "command", "commit", "dirty", "versions", "device", "seconds", "seed"}
    assert kept <= set(saved)
    assert saved["seed"] == 7 and saved["config"]["model"] == {"model": "fake"}


def test_a_killed_run_goes_on_and_asks_nothing_twice(colours: Colours, tmp_path: Path) -> None:
    """Prevents a restart that starts over, or that loses what was answered."""
    dying = FakeAnswerer(dies_after=3)
    with pytest.raises(KeyboardInterrupt):
        run_task(dying, colours, tmp_path, batch_size=2)
    assert len(_file(tmp_path).read_text().splitlines()) == 4
    second = FakeAnswerer()
    result = run_task(second, colours, tmp_path, batch_size=2)
    assert sorted(dying.asked + second.asked) == sorted(set(dying.asked + second.asked))
    assert len(dying.asked) + len(second.asked) == 6 and result["metrics"]["score"] == 100
    unbroken = run_task(FakeAnswerer(), colours, tmp_path / "unbroken")
    assert unbroken["answers_sha256"] == result["answers_sha256"]
    third = FakeAnswerer()
    run_task(third, colours, tmp_path)
    assert third.asked == []


def test_a_torn_last_line_is_dropped_and_asked_again(
    colours: Colours, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents half an answer from being read as an answer, and a kill from making the file unusable."""
    run_task(FakeAnswerer(), colours, tmp_path)
    text = _file(tmp_path).read_text()
    last = text.splitlines()[-1]
    _file(tmp_path).write_text(text[: -len(last) // 2])
    again = FakeAnswerer()
    result = run_task(again, colours, tmp_path)
    assert [question for _, question in again.asked] == [json.loads(last)["prompt"]]
    assert result["n_questions"] == 6 and "torn last line" in capsys.readouterr().err


def test_a_whole_last_line_without_newline_is_kept(colours: Colours, tmp_path: Path) -> None:
    """Prevents asking twice when only the newline was lost."""
    run_task(FakeAnswerer(), colours, tmp_path)
    _file(tmp_path).write_text(_file(tmp_path).read_text().rstrip("\n"))
    again = FakeAnswerer()
    run_task(again, colours, tmp_path)
    assert again.asked == [] and len(_file(tmp_path).read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [lines[0], lines[1][:20], *lines[2:]], "line 2 is corrupt"),
        (lambda lines: [lines[0], "", *lines[1:]], "line 2 is corrupt"),
        (lambda lines: [*lines, lines[2]], r"1 question id\(s\) answered twice: q1"),
        (lambda lines: [*lines, lines[0].replace('"q0"', '"q99"')], r"1 question id\(s\) not in this task: q99"),
        (lambda lines: [lines[0].replace("question 0", "question 9"), *lines[1:]], "under another prompt: q0"),
    ],
)
def test_a_spoilt_answers_file_is_an_error_that_names_the_place(
    colours: Colours, tmp_path: Path, spoil: Callable[[list[str]], list[str]], message: str
) -> None:
    """Prevents LLaVA's habits: joining by line order, and predictions that leave the denominator."""
    run_task(FakeAnswerer(), colours, tmp_path)
    lines = _file(tmp_path).read_text().splitlines()
    _file(tmp_path).write_text("\n".join(spoil(lines)) + "\n")
    with pytest.raises(AnswersError, match=message):
        run_task(FakeAnswerer(), colours, tmp_path)


def test_missing_predictions_are_named_when_scoring(colours: Colours, tmp_path: Path) -> None:
    """Prevents a smaller denominator: `rescore` asks nothing and must not score five of six."""
    run_task(FakeAnswerer(), colours, tmp_path)
    assert rescore(colours, tmp_path)["metrics"]["score"] == 100
    lines = _file(tmp_path).read_text().splitlines()
    dropped = json.loads(lines.pop(1))["id"]
    _file(tmp_path).write_text("\n".join(lines) + "\n")
    with pytest.raises(AnswersError, match=f"1 of 6 questions have no answer: {dropped}"):
        rescore(colours, tmp_path)


def test_limit_takes_the_first_questions_and_can_be_raised(colours: Colours, tmp_path: Path) -> None:
    """Prevents a limit that counts pictures, or that makes a later full run ask again."""
    first = FakeAnswerer()
    assert run_task(first, colours, tmp_path, limit=2)["n_questions"] == 2
    assert [question for _, question in first.asked] == ["question 0 ?", "question 1 ?"]
    second = FakeAnswerer()
    assert run_task(second, colours, tmp_path)["n_questions"] == 6
    assert len(second.asked) == 4


def test_another_model_or_protocol_cannot_go_on_with_the_same_file(tmp_path: Path) -> None:
    """Prevents a score that mixes the answers of two models."""
    run_task(FakeAnswerer(), Colours(), tmp_path, limit=2, config={"model": "a"})
    with pytest.raises(AnswersError, match="model was .*'a'.* is .*'b'"):
        run_task(FakeAnswerer(), Colours(), tmp_path, config={"model": "b"})
    with pytest.raises(AnswersError, match="protocol was"):
        run_task(FakeAnswerer(), Colours(strict=False), tmp_path, config={"model": "a"})


def test_an_answerer_that_returns_too_few_answers_is_refused(colours: Colours, tmp_path: Path) -> None:
    """Prevents answers that slip to the next question."""

    class Short(FakeAnswerer):
        def answer(self, *asked: Any) -> list[str]:  # type: ignore[override]
            return super().answer(*asked)[:-1]

    with pytest.raises(ValueError, match=r"asked \[2, 2, 2\] questions .* got \[1, 1, 1\]"):
        run_task(Short(), colours, tmp_path)


def test_an_answerer_for_batches_gets_several_pictures_at_once(colours: Colours, tmp_path: Path) -> None:
    """Prevents batches of one on tasks with one question a picture."""
    sizes = []

    class Batched(FakeAnswerer):
        def answer_batch(self, asks: list[Ask], max_new_tokens: int) -> list[list[str]]:
            sizes.append([len(ask.questions) for ask in asks])
            return [["yes"] * len(ask.questions) for ask in asks]

    run_task(Batched(), colours, tmp_path, batch_size=4)
    assert sizes == [[2, 2], [2]]


def test_the_progress_bar_leaves_standard_output_alone(
    colours: Colours, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a bar inside piped results."""
    run_task(FakeAnswerer(), colours, tmp_path)
    assert capsys.readouterr().out == ""


LOGGED_RUN = """
import sys, time
from tests_eval_conftest import Colours
from PIL import Image
from htc_vlm.eval.run import run_task

class Logs:
    def answer(self, image_key, load_image, questions, max_new_tokens):
        with open(sys.argv[2], "a") as log:
            log.writelines(f"{question}\\n" for question in questions)
        return ["yes"] * len(questions)

run_task(Logs(), Colours(), sys.argv[1], batch_size=1)
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    """A real SIGKILL, not an exception: what was answered is on disk, and only the open question is asked again."""
    (tmp_path / "tests_eval_conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())

    places = str(tmp_path / "out"), str(tmp_path / "asked.log")
    processes.killed_at("htc_vlm.eval.run:append_answers", 3, LOGGED_RUN, *places, path=tmp_path)
    assert len(_file(tmp_path / "out").read_text().splitlines()) == 2
    done = processes.run_code(LOGGED_RUN, *places, path=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked.log").read_text().splitlines()
    assert len(_file(tmp_path / "out").read_text().splitlines()) == 6
    assert len(asked) == 7  # the third question was never answered, and is asked again
    assert set(asked) == {f"question {i} ?" for i in range(6)}


def test_a_second_run_in_the_same_folder_is_refused(colours: Colours, tmp_path: Path) -> None:
    """Two processes would append to one answers file, each asking all; the lock goes with its process."""

    class Second(FakeAnswerer):
        def answer(self, *asked: Any) -> list[str]:  # type: ignore[override]
            with pytest.raises(AnswersError, match="another evaluation is writing there"):
                run_task(FakeAnswerer(), colours, tmp_path)
            return super().answer(*asked)

    assert run_task(Second(), colours, tmp_path)["n_questions"] == 6
    assert run_task(FakeAnswerer(), colours, tmp_path)["n_questions"] == 6  # the lock is free again


def test_fewer_questions_do_not_replace_the_result_of_more(colours: Colours, tmp_path: Path) -> None:
    """`--limit 2` over a finished run would leave a score over two questions where that of six was."""
    run_task(FakeAnswerer({"question 0 ?": "no"}), colours, tmp_path)
    path = tmp_path / "colours-test" / "result.json"
    before = path.read_bytes()
    with pytest.raises(AnswersError, match="result of 6 questions; one of 2 would replace it"):
        run_task(FakeAnswerer(), colours, tmp_path, limit=2)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="limit is 0"):
        run_task(FakeAnswerer(), colours, tmp_path, limit=0)
    for batch_size in (0, -1):  # -1 asked nothing, 0 was Python's "range() arg 3"
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}; give at least 1"):
            run_task(FakeAnswerer(), colours, tmp_path / "other", batch_size=batch_size)


def test_torchrun_is_refused_by_name(colours: Colours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its processes would ask every question."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2; start it without torchrun"):
        run_task(FakeAnswerer(), colours, tmp_path)


def test_a_run_leaves_each_question_its_mark(colours: Colours, tmp_path: Path) -> None:
    """`htc-vlm compare` resamples them: six marks, question 0 wrong, with their pictures."""
    run_task(FakeAnswerer({"question 0 ?": "no"}), colours, tmp_path)
    marks = [json.loads(line) for line in (tmp_path / "colours-test" / "marks.jsonl").read_text().splitlines()]
    assert [(mark["id"], mark["image"]) for mark in marks[:2]] == [("q0", "p0"), ("q1", "p1")]
    assert [mark["score"] for mark in marks] == [0, 1, 1, 1, 1, 1]


@dataclass(frozen=True)
class Percent(Colours):
    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return [Mark(item.id, item.image, 100) for item in items]


@dataclass(frozen=True)
class Half(Colours):
    def marks(self, items: Sequence[Item], answers: Mapping[str, str]) -> list[Mark]:
        return super().marks(items[::2], answers)


@dataclass(frozen=True)
class Nameless(Colours):
    def score(self, items: Sequence[Item], answers: Mapping[str, str]) -> dict[str, float]:
        return {"accuracy": 50.0}


class Plain:
    name, splits, max_new_tokens = "plain", ("test",), 4
    load, score = Colours.load, Colours.score


@dataclass(frozen=True)
class Numbers(Colours):
    def load(self, root: Path, split: str) -> list[Item]:
        return [replace(item, id=number) for number, item in enumerate(super().load(root, split))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "message", "n_asked"),
    [
        (Percent(), "the mark of q0 is 100; marks go from 0 to 1; mend the task and start again: the answers are kept", 6),
        (Half(), r"3 marks for 6 questions, not one for each \(q1, q3, q5\)", 6),
        (Nameless(), 'its score gives accuracy, but no "score", the number that tables print', 6),
        (Plain(), "task plain is Plain, which is no dataclass", 0),
        (Numbers(), "an item's id is 0, a int; give text", 0),
    ],
)
def test_a_task_that_breaks_its_promises_is_refused(task: Any, message: str, n_asked: int, tmp_path: Path) -> None:
    """They were a KeyError, a TypeError, a "corrupt" file, or 10000 percent."""
    fake = FakeAnswerer()
    with pytest.raises(ValueError, match=message):
        run_task(fake, task, tmp_path)
    assert len(fake.asked) == n_asked
    assert not list(tmp_path.glob("*/result.json")) and not list(tmp_path.glob("*/marks.jsonl"))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_result_names_no_commit_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library in a project's .venv: the project's commit stood in its results as the library's."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "run_info.py").write_text("")
    monkeypatch.setattr(run_info, "__file__", str(tmp_path / "run_info.py"))
    found = run_info.provenance()
    assert found["commit"] is None and found["dirty"] is None
