"""Each official benchmark end to end: its real directory in miniature, a scripted model, the score by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from htc_vlm.eval.run import rescore, run_task
from htc_vlm.eval.task import find_tasks, make_task

from . import miniatures
from .conftest import FakeAnswerer

OFFICIAL = ("gqa", "vqav2", "mmbench", "mme", "pope", "seedbench", "scienceqa", "textvqa", "mmvet")


class ScriptedAnswerer(FakeAnswerer):
    """Refuses a prompt that is not in its script, so the prompt is tested to the letter."""

    def answer(self, *asked: Any) -> list[str]:  # type: ignore[override]
        unknown = [question for question in asked[2] if question not in self.table]
        assert not unknown, f"prompts that the benchmark's authors would not recognise: {unknown}"
        return super().answer(*asked)


def _run(said: dict[str, str], name: str, tmp_path: Path, split: str | None = None, **options: Any) -> dict[str, Any]:
    answerer = ScriptedAnswerer(said)
    task = make_task(name, options)
    return run_task(answerer, task, tmp_path / "out", root=tmp_path, split=split)


def test_every_benchmark_has_its_file() -> None:
    """Prevents a benchmark that is documented but not found."""
    assert set(OFFICIAL) <= set(find_tasks().names())


def test_gqa(tmp_path: Path) -> None:
    """8 of 12; open 6 of 8; binary 2 of 4. Prevents a match that forgives an article or a synonym."""
    said = miniatures.gqa(tmp_path)
    metrics = _run(said, "gqa", tmp_path)["metrics"]
    # "choose" counts as binary in the official script: everything but "query".
    assert metrics == pytest.approx({"score": 800 / 12, "binary": 50, "open": 75})


def test_vqav2_val(tmp_path: Path) -> None:
    """7.7 of 12. Prevents normalising where the official code does not (all ten agree)."""
    metrics = _run(miniatures.vqav2(tmp_path), "vqav2", tmp_path)["metrics"]
    assert metrics == pytest.approx({"score": 770 / 12, "yes/no": 72.5, "number": 47.5, "other": 72.5})


def test_vqav2_test_dev_gives_an_upload_and_no_score(tmp_path: Path) -> None:
    """Prevents a number for a split whose answers nobody has."""
    result = _run(miniatures.vqav2(tmp_path), "vqav2", tmp_path, split="test-dev")
    assert result["metrics"] == {}
    upload = json.loads((tmp_path / "out" / "vqav2-test-dev" / "export.json").read_text())
    assert upload[0] == {"question_id": 42000, "answer": "yes"}
    assert [line["answer"] for line in upload] == ["yes", "yes", "yes", "no", "2"]


@pytest.mark.parametrize("with_rotations", [True, False])
def test_mmbench(tmp_path: Path, with_rotations: bool) -> None:
    """Circular 2 of 4, unrotated 3 of 4, whether the file holds the rotations or we make them."""
    said = miniatures.mmbench(tmp_path, with_rotations)
    result = _run(said, "mmbench", tmp_path)
    assert result["n_questions"] == 11 and result["n_images"] == 4
    assert result["metrics"] == pytest.approx({"score": 50, "circular": 50, "vanilla": 75, "odd": 100, "even": 0})


def test_mmbench_vanilla_is_a_choice(tmp_path: Path) -> None:
    """Prevents the two rules from being mixed up."""
    assert _run(miniatures.mmbench(tmp_path), "mmbench", tmp_path, circular=False)["metrics"]["score"] == 75


def test_mmbench_refuses_a_limit_that_cuts_rotations(tmp_path: Path) -> None:
    """Prevents a circular score over half a circle."""
    said = miniatures.mmbench(tmp_path)
    with pytest.raises(ValueError, match="--limit cuts"):
        run_task(FakeAnswerer(said), "mmbench", tmp_path / "out", 5, root=tmp_path)
    whole = run_task(FakeAnswerer(said), "mmbench", tmp_path / "out", 4, root=tmp_path)
    assert whole["metrics"]["circular"] == 100


def test_mme(tmp_path: Path) -> None:
    """Perception 125 + 50 + 8 x 200, cognition 200 + 50 + 0 + 50. Prevents acc+ over questions instead of pictures."""
    metrics = _run(miniatures.mme(tmp_path), "mme", tmp_path)["metrics"]
    assert {name: metrics[name] for name in ("score", "perception", "cognition", "total")} == pytest.approx(
        {"score": 1775, "perception": 1775, "cognition": 300, "total": 2075}
    )
    assert metrics["existence"] == pytest.approx(125) and metrics["code_reasoning"] == pytest.approx(50)


def test_mme_of_table_2_is_the_total(tmp_path: Path) -> None:
    """Prevents comparing perception with perception + cognition."""
    assert _run(miniatures.mme(tmp_path), "mme", tmp_path, headline="total")["metrics"]["score"] == pytest.approx(2075)


def test_mme_without_a_subtask_is_refused(tmp_path: Path) -> None:
    """Prevents a sum over thirteen subtasks."""
    said = miniatures.mme(tmp_path)
    for path in (tmp_path / "mme" / "MME_Benchmark_release_version" / "count").iterdir():
        path.rename(path.with_suffix(".gone"))
    (tmp_path / "mme" / "MME_Benchmark_release_version" / "count").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="count"):
        _run(said, "mme", tmp_path)


def test_pope(tmp_path: Path) -> None:
    """F1 1/2, 1, 2/3; accuracy 1/2, 1, 1/2; yes ratio of the answers 1/2, 1/2, 1."""
    metrics = _run(miniatures.pope(tmp_path), "pope", tmp_path)["metrics"]
    assert metrics["score"] == metrics["f1"] == pytest.approx(100 * (1 / 2 + 1 + 2 / 3) / 3)
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert metrics["adversarial recall"] == 100 and metrics["adversarial precision"] == 50
    assert metrics["yes_ratio"] == pytest.approx(200 / 3)


def test_pope_one_setting_and_accuracy(tmp_path: Path) -> None:
    """Question ids repeat from file to file: prevents the settings from overwriting one another."""
    said = miniatures.pope(tmp_path)
    result = _run(said, "pope", tmp_path, split="random", headline="accuracy")
    assert result["n_questions"] == 4 and result["metrics"]["score"] == 50


def test_seedbench(tmp_path: Path) -> None:
    """Pictures 7 of 10; with video frames 8 of 12."""
    said = miniatures.seedbench(tmp_path)
    metrics = _run(said, "seedbench", tmp_path)["metrics"]
    assert metrics == pytest.approx(
        {"score": 70, "image": 70, "Scene Understanding": 500 / 6, "Instance Identity": 50}
    )
    task = make_task("seedbench", {"subset": "all"})
    everything = run_task(FakeAnswerer(said), task, tmp_path / "all", root=tmp_path)
    assert everything["metrics"]["score"] == pytest.approx(800 / 12)
    assert everything["metrics"]["video"] == everything["metrics"]["Action Prediction"] == 50


def test_scienceqa_counts_every_question_with_a_picture(tmp_path: Path) -> None:
    """7 of 10. Prevents LLaVA's shrinking denominator, and a letter that is not on offer."""
    result = _run(miniatures.scienceqa(tmp_path), "scienceqa", tmp_path)
    assert result["n_questions"] == 10
    assert result["metrics"] == pytest.approx({"score": 70, "natural science": 500 / 6, "social science": 50})


def test_scienceqa_in_the_wording_of_the_converter(tmp_path: Path) -> None:
    """Prevents the context from coming last (44.8 instead of 66.8, LLaVA#1294)."""
    miniatures.scienceqa(tmp_path)
    items = make_task("scienceqa", {"prompt": "cqm"}).load(tmp_path, "test")
    assert items[0].prompt.startswith("Context: N/A\nQuestion: Which 0?\nOptions: (A) choice 0 0 (B) choice 0 1")
    assert items[1].prompt.startswith("Context: Select the better answer.\nQuestion: Which 1?\n")


@pytest.mark.parametrize("ocr", [True, False])
def test_textvqa(tmp_path: Path, ocr: bool) -> None:
    """4.2 of 6, with and without OCR tokens in the prompt."""
    metrics = _run(miniatures.textvqa(tmp_path, ocr), "textvqa", tmp_path, ocr=ocr)["metrics"]
    assert metrics == pytest.approx({"score": 70})


def test_mmvet_writes_the_judges_input(tmp_path: Path) -> None:
    """Prevents a score of our own."""
    result = _run(miniatures.mmvet(tmp_path), "mmvet", tmp_path)
    assert result["metrics"] == {}
    assert rescore("mmvet", tmp_path / "out", limit=1, root=tmp_path)["n_questions"] == 1  # and writes nothing
    export = json.loads((tmp_path / "out" / "mmvet-v1" / "export.json").read_text())
    assert export == {"v1_0": "Because of 0.", "v1_1": "Because of 1.", "v1_2": "Because of 2."}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_missing_official_file_is_named(tmp_path: Path, name: str) -> None:
    """Prevents an empty benchmark from scoring as if it had run."""
    with pytest.raises(FileNotFoundError, match="missing"):
        run_task(FakeAnswerer(), name, tmp_path / "out", root=tmp_path)


def test_unknown_options_and_splits_are_refused(tmp_path: Path) -> None:
    """Prevents a protocol flag that is accepted and ignored."""
    with pytest.raises(ValueError, match="task pope has no option headlin; its options: headline"):
        make_task("pope", {"headlin": "f1"})
    with pytest.raises(ValueError, match="task mmbench: circular is 'maybe'; give true or false"):
        make_task("mmbench", {"circular": "maybe"})
    with pytest.raises(ValueError, match="f1, accuracy"):
        make_task("pope", {"headline": "recall"})
    with pytest.raises(ValueError, match="no split 'val'; known: testdev_balanced"):
        run_task(FakeAnswerer(), "gqa", tmp_path, split="val")
    with pytest.raises(ValueError, match="unknown task 'gqq'"):
        make_task("gqq")
