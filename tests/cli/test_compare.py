"""`htc-vlm compare`: two evaluations of the same questions, their difference with a paired interval, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import htc_vlm_cli
from htc_vlm.cli.compare import run
from htc_vlm.eval.run import run_task

from ..eval import miniatures
from ..eval.conftest import FakeAnswerer


def _evaluated(root: Path, output: str, wrong: tuple[str, ...] = (), limit: int | None = None) -> Path:
    """GQA's miniature, answered by its script; the answers to `wrong` questions are nonsense."""
    if not (root / "gqa").exists():
        miniatures.gqa(root)
    said = miniatures.gqa(root)
    said = {prompt: "nonsense" if prompt.startswith(wrong) else answer for prompt, answer in said.items()}
    run_task(FakeAnswerer(said), "gqa", root / output, limit, root=root)
    return root / output


def test_the_difference_of_two_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 of 12 right against 6: 16.67 points, over four pictures; the interval is of pairs and holds it."""
    first = _evaluated(tmp_path, "a")
    second = _evaluated(tmp_path, "b", wrong=("What is 0?", "What is 3?"))
    assert run([str(first), str(second), "--format", "json"]) == 0
    [one] = json.loads(capsys.readouterr().out)["tasks"]
    assert one["task"] == "gqa-testdev_balanced"
    assert one["first"]["percent"] == one["first_score"] == pytest.approx(800 / 12)
    assert one["second"]["percent"] == pytest.approx(600 / 12)
    gain = one["difference"]
    assert gain["points"] == pytest.approx(200 / 12) and (gain["n_questions"], gain["n_images"]) == (12, 4)
    assert 0 <= gain["low"] <= gain["points"] <= gain["high"] <= 100 / 3  # no picture loses, none gains over a third
    assert run([str(first / "gqa-testdev_balanced"), str(second / "gqa-testdev_balanced" / "result.json")]) == 0
    assert "| gqa-testdev_balanced | 12 | 4 | 66.67 [" in capsys.readouterr().out


def test_a_result_equals_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents an unpaired interval, which would be wide here."""
    first = _evaluated(tmp_path, "a")
    assert run([str(first), str(first)]) == 0
    assert "+0.00 [+0.00, +0.00]" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2: other questions, another protocol, no marks, no result; nothing on standard output."""
    first = _evaluated(tmp_path, "a")
    few = _evaluated(tmp_path, "few", limit=6)
    assert htc_vlm_cli.main(["compare", str(first), str(few)]) == 2
    assert htc_vlm_cli.main(["compare", str(first), str(tmp_path / "nowhere")]) == 2
    (few / "gqa-testdev_balanced" / "marks.jsonl").unlink()
    assert htc_vlm_cli.main(["compare", str(few), str(few)]) == 2
    result = few / "gqa-testdev_balanced" / "result.json"
    result.write_text(result.read_text().replace('"testdev_balanced"', '"challenge"'))
    assert htc_vlm_cli.main(["compare", str(first), str(few)]) == 2
    assert htc_vlm_cli.main(["compare", str(first), str(first), "--level", "2"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    for words in ("answers 12 questions", "6 are in one of them only", "holds no result.json", "marks.jsonl is missing",
                  "differ in split", "0 < level < 1"):  # fmt: skip
        assert words in told.err


def test_tasks_without_marks_or_score_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running the same eval again, which the message asked for, would never write them."""
    run_task(FakeAnswerer(miniatures.mmvet(tmp_path)), "mmvet", tmp_path / "a", root=tmp_path)
    assert htc_vlm_cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "its task has no `marks`, which are what is compared" in capsys.readouterr().err
    first = _evaluated(tmp_path, "b") / "gqa-testdev_balanced"
    result = json.loads((first / "result.json").read_text())
    (first / "result.json").write_text(json.dumps(result | {"metrics": {}}))
    assert htc_vlm_cli.main(["compare", str(first), str(first)]) == 2
    assert "has no score" in capsys.readouterr().err
    (first / "result.json").write_text(json.dumps(result))
    marks = (first / "marks.jsonl").read_text()
    (first / "marks.jsonl").write_text(marks.replace('"score": true', '"score": 100'))
    assert htc_vlm_cli.main(["compare", str(first), str(first)]) == 2
    assert "is 100; marks go from 0 to 1" in capsys.readouterr().err


def test_tasks_that_only_one_has_make_it_partly_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the other task compared, the lonely one named on standard error."""
    first, second = _evaluated(tmp_path, "a"), _evaluated(tmp_path, "b")
    said = miniatures.pope(tmp_path)
    run_task(FakeAnswerer(said), "pope", first, root=tmp_path)
    assert run([str(first), str(second)]) == 1
    told = capsys.readouterr()
    assert "| gqa-testdev_balanced |" in told.out and "pope-all" not in told.out
    assert f"pope-all: {second} has no result of it" in told.err


def test_mmbench_is_compared_by_whole_circles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four questions, two of them right in all rotations: 50, the circular score. Eleven rows are no eleven questions."""
    said = miniatures.mmbench(tmp_path)
    run_task(FakeAnswerer(said), "mmbench", tmp_path / "a", root=tmp_path)
    assert run([str(tmp_path / "a"), str(tmp_path / "a"), "--format", "json"]) == 0
    [one] = json.loads(capsys.readouterr().out)["tasks"]
    assert one["first"]["percent"] == one["first_score"] == 50 and one["difference"]["n_questions"] == 4
