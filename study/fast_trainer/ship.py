"""From a run's state to what is committed of a shipped model: checkpoint, training record, evaluations.

    src/htc_vlm/checkpoints/NAME                      the checkpoint
    study/results/tiny/NAME/training*                 metrics.jsonl, report.json, loss.png
    study/results/tiny/NAME/pictograms-test.json ...  whole test sets

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from htc_vlm.files import write_json
from htc_vlm.train.loop import plot_loss
from study.fast_trainer import state
from study.fast_trainer.model import method_of
from study.fast_trainer.settings import Run, make_run
from study.fast_trainer.train import report_of, starting_model
from study.fast_trainer.weights import export, fast_model

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS, RESULTS = ROOT / "src" / "htc_vlm" / "checkpoints", ROOT / "study" / "results" / "tiny"
# task, options of `htc-vlm eval`
TESTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pictograms", ("--split", "test")),
    ("pictograms", ("--split", "test-unseen")),
    ("easy-vqa", ()),
    ("fashion-mnist", ("--limit", "2000")),
)
LOWER = {"tiny-upper": "tiny-lower"}  # whose untrained bottleneck is the lower bound, and its name


def export_state(folder: Path, out: Path, n_entries: int | None = None) -> int:
    """A run's last saved state as a checkpoint folder; the step. n_entries: only the first of an elastic model's."""
    saved = state.read(folder)
    run = make_run(saved["settings"], folder / state.STATE)
    if run.lora is not None:
        raise ValueError(f"{folder}: an adapter, which leaves no checkpoint of its own; load(START, adapter={folder}/adapter)")
    if n_entries is not None:
        run, rows = first_entries(run, n_entries), saved["model"]["rows"]
        saved["model"]["rows"] = rows[: n_entries * method_of(run.compressor).n_readers]
    library, processor = starting_model(run, folder)
    model = fast_model(library, reads_turn=run.turn_loss > 0)
    model.load_state_dict(saved["model"])
    export(model, library, processor, out)
    return int(saved["step"])


def first_entries(run: Run, n_entries: int) -> Run:
    """The same run with a model of so many entries an image. ValueError where it was not trained for that."""
    budgets = method_of(run.compressor).budgets
    if n_entries not in budgets:
        raise ValueError(f"--entries is {n_entries}; this run was trained with {', '.join(map(str, budgets))}")
    settings = {**run.compressor, "n_bottleneck": n_entries, "elastic": n_entries > 1}
    return replace(run, compressor=settings)


def ship(folder: Path, name: str, record: str = "training", n_entries: int | None = None) -> None:
    """Checkpoint and training record of a run into the repository. record: their folder, e.g. training-first."""
    export_state(folder, CHECKPOINTS / name, n_entries)
    keep_record(folder, RESULTS / name / record)


def keep_record(folder: Path, out: Path) -> None:
    """metrics.jsonl, report.json and loss.png of a run, without what only this machine knows."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / state.METRICS, out / state.METRICS)
    if (folder / state.REPORT).is_file():
        report = json.loads((folder / state.REPORT).read_text())
    else:  # cut off, or made by hand
        saved = state.read(folder)
        report = report_of(make_run({**saved["settings"], "steps": saved["step"]}, folder), folder, {})
    write_json(out / state.REPORT, without_paths(report), indent=1)
    plot_loss(out / state.METRICS, out / "loss.png", title=folder.name)


def without_paths(value: Any) -> Any:
    """Absolute paths cut down to their last two parts, everywhere in a result.

    >>> without_paths({"start": "/home/me/runs/upper/model", "command": "htc-vlm eval tiny --data /data/sets", "n": 1})
    {'start': 'upper/model', 'command': 'htc-vlm eval tiny --data data/sets', 'n': 1}
    """
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    return " ".join("/".join(Path(word).parts[-2:]) if word.startswith("/") else word for word in value.split(" "))


def evaluations(name: str, numbers: Sequence[int]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(kept as, task, options of `htc-vlm eval`) of these tests, and of the lower bound where it is made of this model."""
    out = []
    for task, options in (TESTS[number] for number in numbers):
        out.append((name, task, options))
        if name in LOWER and task == "pictograms":
            out.append((LOWER[name], task, (*options, "--compressor", "voco")))
    return out


def evaluate(name: str, work: Path, data: Path, batch_size: int, numbers: Sequence[int]) -> None:
    """Whole test sets of a shipped model, each in a process of its own; what was cut off goes on. Writes below `work` only, so
    that several may run side by side from a clean checkout."""
    code = "import sys; from htc_vlm_cli import main; sys.argv[0] = 'htc-vlm'; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    for kept_as, task, options in evaluations(name, numbers):
        words = ["eval", name, "--task", task, *options, "--output", str(work / kept_as), "--data", str(data)]
        words += ["--batch-size", str(batch_size)]
        subprocess.run([sys.executable, "-c", code, *words], check=True, env=environment)


def collect(name: str, work: Path, data: Path) -> list[Path]:
    """The results that `evaluate` left below `work`, into study/results/tiny; the files written."""
    written = []
    for kept_as, task, options in evaluations(name, range(len(TESTS))):
        test = f"{task}-{options[1] if '--split' in options else 'test'}"
        file = work / kept_as / test / "result.json"
        if file.is_file():
            found = json.loads(file.read_text().replace("/".join(("...", *data.absolute().parts[-2:])), "DIR"))
            kept = RESULTS / kept_as / f"{test}.json"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(without_paths(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            written.append(kept)
    return written
