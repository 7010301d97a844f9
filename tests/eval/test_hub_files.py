"""Benchmarks read from the parquet files of the Hugging Face hub: the same questions, pictures and scores."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from htc_vlm.eval.run import run_task
from htc_vlm.eval.task import make_task

from . import miniatures
from .conftest import FakeAnswerer

pytest.importorskip("pyarrow")

from . import hub_miniatures  # noqa: E402

TASKS = ("gqa", "vqav2", "mmbench", "mme", "pope", "seedbench", "scienceqa", "textvqa", "mmvet")


def _by_prompt(name: str, root: Path, **options: Any) -> dict[str, Any]:
    """{prompt: pixels}"""
    task = make_task(name, options)
    return {item.prompt: (item.load().mode, item.load().tobytes()) for item in task.load(root, task.splits[0])}


@pytest.mark.parametrize("name", TASKS)
def test_the_hubs_files_give_the_same_questions_pictures_and_scores(name: str, tmp_path: Path) -> None:
    """Prevents a second reading of a benchmark that differs from the first one."""
    said = vars(miniatures)[name](tmp_path)
    official, pictures = run_task(FakeAnswerer(said), name, tmp_path / "a", root=tmp_path), _by_prompt(name, tmp_path)
    hub_miniatures.to_hub(name, tmp_path)
    hub = run_task(FakeAnswerer(said), name, tmp_path / "b", root=tmp_path)
    assert hub["n_questions"] == official["n_questions"] and hub["metrics"] == pytest.approx(official["metrics"])
    assert _by_prompt(name, tmp_path) == pictures
    assert hub["baselines"] == {which: pytest.approx(metrics) for which, metrics in official["baselines"].items()}


def test_video_frames_and_the_upload_split(tmp_path: Path) -> None:
    """SEED's videos show their middle frame; VQAv2 test-dev has no answers and no score."""
    said = miniatures.seedbench(tmp_path)
    pictures = _by_prompt("seedbench", tmp_path, subset="all")
    hub_miniatures.to_hub("seedbench", tmp_path)
    assert _by_prompt("seedbench", tmp_path, subset="all") == pictures and len(pictures) == 12
    assert run_task(FakeAnswerer(said), make_task("seedbench", {"subset": "all"}), tmp_path, root=tmp_path)["n_questions"] == 12
    miniatures.vqav2(tmp_path)
    hub_miniatures.to_hub("vqav2", tmp_path)
    result = run_task(FakeAnswerer(), "vqav2", tmp_path / "out", root=tmp_path, split="test-dev")
    assert (result["metrics"], result["baselines"], result["n_questions"]) == ({}, {}, 5)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    """A file of another data set in the right place."""
    miniatures.mmvet(tmp_path)
    hub_miniatures.to_hub("mmvet", tmp_path)
    (tmp_path / "mm-vet").rename(tmp_path / "pope")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet: has no column answer, image_source, category; it has"):
        make_task("pope").load(tmp_path, "all")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`No module named 'pyarrow'` does not say what to install."""
    miniatures.pope(tmp_path)
    hub_miniatures.to_hub("pope", tmp_path)
    importing = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs pyarrow; pip install 'htc-vlm\[parquet\]'"):
        make_task("pope").load(tmp_path, "all")
