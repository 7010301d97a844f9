"""`htc-vlm eval` as a process: killed with SIGKILL and started again; its answers file corrupted; a prediction dropped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .. import processes
from .. import tiny_runs as tiny

pytestmark = pytest.mark.slow
MAIN = "import sys; from htc_vlm_cli import main; sys.exit(main(sys.argv[1:]))"
N_QUESTIONS = 24


def command(output: Path, *more: str) -> list[str]:
    words = ["eval", str(tiny.checkpoint(tiny.HTC)), "--task", "pictograms", "--limit", str(N_QUESTIONS), "--batch-size", "1"]
    return [*words, "--output", str(output), *more]


def answers(output: Path) -> Path:
    return output / "pictograms-test" / "answers.jsonl"


def ids(output: Path) -> list[str]:
    return [json.loads(line)["id"] for line in answers(output).read_text().splitlines()]


def result(output: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((output / "pictograms-test" / "result.json").read_text())
    return found


def finished(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return processes.run_code(MAIN, *command(output, *more))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    assert finished(output).returncode == 0
    return output


def test_sigkill_and_restart_give_the_unbroken_result(unbroken: Path, tmp_path: Path) -> None:
    """Nothing asked twice, nothing lost: the same ids once each, the same answers, the same score."""
    processes.killed_at("htc_vlm.eval.run:append_answers", 6, MAIN, *command(tmp_path))
    kept = answers(tmp_path).read_bytes()
    assert kept.count(b"\n") == 5 and not (tmp_path / "pictograms-test" / "result.json").exists()
    assert finished(tmp_path).returncode == 0
    assert answers(tmp_path).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert ids(tmp_path) == ids(unbroken) and len(set(ids(tmp_path))) == N_QUESTIONS
    for name in ("metrics", "answers_sha256", "n_questions"):
        assert result(tmp_path)[name] == result(unbroken)[name]


def copy_of(unbroken: Path, output: Path) -> list[str]:
    """The answers' lines, copied to a folder whose result is still to be written."""
    folder = output / "pictograms-test"
    folder.mkdir()
    (folder / "settings.json").write_bytes((unbroken / "pictograms-test" / "settings.json").read_bytes())
    return answers(unbroken).read_text().splitlines()


def test_a_corrupt_line_is_named_and_nothing_is_scored(unbroken: Path, tmp_path: Path) -> None:
    """One line on stderr, exit code 2, no result file, the answers file untouched."""
    lines = copy_of(unbroken, tmp_path)
    lines[3] = lines[3][:25]
    answers(tmp_path).write_text("\n".join(lines) + "\n")
    before = answers(tmp_path).read_bytes()
    done = finished(tmp_path)
    assert done.returncode == 2 and "line 4 is corrupt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "pictograms-test" / "result.json").exists() and answers(tmp_path).read_bytes() == before


def test_a_dropped_prediction_is_asked_again_and_only_that(unbroken: Path, tmp_path: Path) -> None:
    """The score is over all questions again, not over one less."""
    lines = copy_of(unbroken, tmp_path)
    dropped = json.loads(lines.pop(7))["id"]
    answers(tmp_path).write_text("\n".join(lines) + "\n")
    assert finished(tmp_path).returncode == 0
    assert answers(tmp_path).read_text().splitlines()[:-1] == lines and ids(tmp_path)[-1] == dropped
    assert result(tmp_path)["answers_sha256"] == result(unbroken)["answers_sha256"]
