"""`htc-vlm eval` where some tasks cannot be read, and `--verbose` of an uncompressed model: what is told, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from htc_vlm.cli import ask, eval
from htc_vlm.eval.task import TASKS, make_task
from htc_vlm_cli import main

from .. import processes, tinies
from ..eval import miniatures


def test_one_task_of_two_is_partly_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal after an hour's work threw its exit code away with it: the done task is printed with its blind baselines,
    the other is named, and the code is 1. Without a single task it is 2, before a model is loaded."""
    miniatures.gqa(tmp_path / "data")
    common = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert main(["eval", "no-such-model", "--task", "pope", *common]) == 2
    assert "Task pope reads, below" in capsys.readouterr().err
    assert main(["eval", str(tinies.save_llava(tmp_path / "llava")), "--task", "pope,gqa", *common]) == 1
    told = capsys.readouterr()
    shown = json.loads(told.out)
    assert shown["task"] == "gqa" and shown["blind"] == {"always yes": 16.67, "majority": 25.0, "question only": 25.0}
    assert "htc-vlm eval: pope: official file missing" in told.err and "using a model of type" not in told.err


def test_missing_pictures_are_told_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of the model is wrong, and nobody notices, since the pictures are looked for first."""
    miniatures.gqa(tmp_path)
    (tmp_path / "gqa" / "images" / "n3.jpg").unlink()
    arguments = ["eval", "no-such-model", "--task", "gqa", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "1 of 4 pictures are missing" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        eval.run([*arguments[1:], "--limit", "9"])  # the first nine questions are about the other three


def test_options_reach_a_task_whose_name_has_dots() -> None:
    """`--set my.task.loose=true` named a task `my`."""

    @TASKS.register("my.task")
    @dataclass(frozen=True)
    class Mine:
        loose: bool = False

    def made(*words: str) -> list[Any]:
        return eval._tasks(eval._parser().parse_args(["model", *words]))

    try:
        assert made("--task", "my.task,pope", "--set", "my.task.loose=true", "--set", "pope.headline=accuracy") == [
            Mine(loose=True), make_task("pope", {"headline": "accuracy"}),
        ]  # fmt: skip
        with pytest.raises(ValueError, match="--set names gqa, which --task does not run"):
            made("--task", "my.task", "--set", "gqa.x=1")
        with pytest.raises(ValueError, match="--set takes TASK.OPTION=VALUE, got loose=True"):
            made("--task", "my.task", "--set", "loose=true")
    finally:
        TASKS.unregister("my.task")


def test_verbose_does_not_call_an_uncompressed_model_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lines of the comparison would be the same model."""
    monkeypatch.setattr(ask, "cost", lambda *arguments: {"cached_tokens": 36})

    class Answerer:
        class model:
            class config:
                compressor = {"name": "none"}

    assert ask.measure(Answerer(), None, "what ?", 2) == {"uncompressed": {"cached_tokens": 36}}


def test_an_ascii_locale_does_not_crash_a_command() -> None:
    """`UnicodeEncodeError: 'ascii' codec can't encode`: letters that the terminal cannot show are escaped."""
    code = "import sys, htc_vlm_cli; sys.argv[1:] = ['caf\\u00e9']; sys.exit(htc_vlm_cli.script())"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=processes.PATIENCE_S)
    assert done.returncode == 2 and b"no command 'caf\\xe9'" in done.stderr and b"Traceback" not in done.stderr


def test_a_bug_is_not_partly_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python's own exit code for a traceback is 1, which a script would take for "some pictures were refused"."""
    import htc_vlm_cli

    def bug() -> int:
        raise TypeError("a bug")

    monkeypatch.setattr(htc_vlm_cli, "main", bug)
    assert htc_vlm_cli.script() == 70 and "TypeError: a bug" in capsys.readouterr().err
