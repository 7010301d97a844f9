"""A run's folder: its state, from which it goes on bit for bit, and its record.

    state.pt        step, weights, optimizer, seconds, the sums of the current line of the record, the settings
    metrics.jsonl   loss and learning rate every log_every steps; right answers by kind every measure_every steps

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from study.answers import differences
from study.fast_trainer.settings import Run, make_run

STATE, METRICS, REPORT = "state.pt", "metrics.jsonl", "report.json"


@dataclass
class Progress:
    """Where a run is. losses: of the first data set's steps since the last line of the record."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def save(folder: Path, run: Run, progress: Progress, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write state.pt, whole or not at all."""
    state = {
        "settings": asdict(run), "step": progress.step, "seconds": progress.seconds, "losses": progress.losses,
        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    partial = folder / "state.partial"
    torch.save(state, partial)
    os.replace(partial, folder / STATE)


def read(folder: Path) -> dict[str, Any]:
    """What `save` wrote; FileNotFoundError where there is nothing."""
    if not (folder / STATE).is_file():
        raise FileNotFoundError(f"{folder / STATE}: no state of a run")
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return state


def check(folder: Path, run: Run, resume: bool) -> None:
    """ValueError where the folder holds a run and it is not asked to go on, or was begun with other settings."""
    if not (folder / STATE).is_file():
        if (folder / METRICS).is_file():  # cut off before its first state
            (folder / METRICS).unlink()
        return
    if not resume:
        raise ValueError(f"{folder}: holds a run; give --resume to go on with it, or another --out")
    before, now = json.loads(json.dumps([make_run(read(folder)["settings"], folder / STATE).binding(), run.binding()]))
    different = differences(before, now)
    if different:
        raise ValueError(f"{folder}: begun with other settings: {'; '.join(different)}; give another --out")


def is_done(folder: Path, run: Run) -> bool:
    """Were all steps made?"""
    return (folder / STATE).is_file() and read(folder)["step"] >= run.steps


def finished(folder: Path, run: Run) -> dict[str, Any] | None:
    """The report of a run that is done to its last file; None for others. ValueError: done with other settings."""
    left = folder / "model" / "config.json" if run.lora is None else folder / "adapter" / "adapter.json"
    if not (folder / REPORT).is_file() or not left.is_file() or not is_done(folder, run):
        return None
    check(folder, run, resume=True)
    report: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return report


def restore(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a run's state where there is one, and cut its record back to it."""
    if not (folder / STATE).is_file():
        return Progress()
    state = read(folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rows = [row for row in record(folder) if row["step"] <= state["step"]]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Progress(state["step"], state["seconds"], list(state["losses"]))


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that was cut off is passed over."""
    if not (folder / METRICS).is_file():
        return []
    rows = []
    for line in (folder / METRICS).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def note(folder: Path, row: dict[str, Any]) -> None:
    """One more line of the record."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")
