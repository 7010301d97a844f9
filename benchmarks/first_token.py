"""Milliseconds to the first token of 32 questions, for every row of the study, in one run on a quiet machine.

    python benchmarks/first_token.py [--data DIR] [--rounds 15] [--output study/results/first_token.json]

The rows take turns within each round, so that a busy machine disturbs them alike; median and quartiles. What was done before
is not counted: the vision tower's features, and for a bottleneck the cells. Trained rows are built untrained: what a token
costs does not depend on the weights. A row that its method refuses is left out; one that shows another row's results counts
once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from htc_vlm.eval.run import Ask, batches, write_json
from htc_vlm.eval.run_info import provenance
from study import evaluating, runner
from study.definitions import Experiment, followed, read_tables
from study.jobs import Job, Study, make_job, task_sets

ROOT = Path(__file__).resolve().parents[1]
N_QUESTIONS = 32


def rows_of(experiments: Path) -> dict[str, Experiment]:
    """Every row that a table shows, by "table/row" of where its results lie; asked N_QUESTIONS of its first task."""
    out = {}
    for table in read_tables(experiments).values():
        for row in table.rows:
            one = followed(experiments / table.name / f"{row}.yaml")
            name, task = next(iter(one.tasks.items()))
            out[one.name] = replace(one, tasks={name: {**task, "limit": N_QUESTIONS}})
    return out


def timer(job: Job, where: Study) -> Callable[[], float] | None:
    """A call that asks the row's questions and returns the seconds until each has its first token; None: impossible."""
    if job.impossible:
        return None
    model, processor = runner.starting_model(job, where)
    try:
        with runner.applied_method(job, model):
            pass
    except ValueError:  # the method refuses this model
        return None
    (tests,) = task_sets(job.experiment, where).values()
    features = evaluating.features_of(tests, model.model.vision_tower, where.cache)
    codes = evaluating.codes_of_tasks(tests, model, where.cache)
    answerer = evaluating.SharedAnswerer(model.eval(), processor, tests, features, codes)
    (batch,) = batches(tests.items, N_QUESTIONS)
    asks = [Ask(group[0].image, group[0].load, [item.prompt for item in group]) for group in batch]

    def once() -> float:
        with runner.applied_method(job, model):
            _wait(where.device)
            start = time.perf_counter()
            answerer.answer_batch(asks, max_new_tokens=1)
            _wait(where.device)
            return time.perf_counter() - start

    return once


def _wait(device: str) -> None:
    """A GPU works on after Python has gone on."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """{row: {"ms": median, "low": , "high": the quartiles}}; a first round warms up and is not counted."""
    if rounds < 2:
        raise ValueError(f"--rounds is {rounds}; quartiles need at least 2")
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name, once in timers.items():
            taken = once()
            if number:
                seconds[name].append(taken)
    out = {}
    for name, values in seconds.items():
        low, middle, high = quantiles(values, n=4, method="inclusive")
        out[name] = {"ms": round(1000 * middle, 2), "low": round(1000 * low, 2), "high": round(1000 * high, 2)}
    return out


def build(rows: dict[str, Experiment], where: Study) -> dict[str, Callable[[], float]]:
    """A timer for each row that its method does not refuse."""
    found = {name: timer(make_job(one, 0, where), where) for name, one in rows.items()}
    return {name: once for name, once in found.items() if once is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets (default: $HTC_VLM_DATA or data)")
    parser.add_argument("--cache", type=Path, help="features of the test pictures; default: a folder that is thrown away")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experiments", type=Path, default=ROOT / "study" / "experiments")
    parser.add_argument("--output", type=Path, default=ROOT / "study" / "results" / "first_token.json")
    options = parser.parse_args(arguments)
    data = options.data or Path(os.environ.get("HTC_VLM_DATA", "data"))
    with tempfile.TemporaryDirectory() as work:
        where = Study(
            work=Path(work), results=options.output.parent, cache=options.cache or Path(work) / "cache", data=data,
            device=options.device, batch_size=N_QUESTIONS,
        )  # fmt: skip
        result: dict[str, Any] = {
            "rows": measure(build(rows_of(options.experiments), where), options.rounds),
            "n_questions": N_QUESTIONS, "rounds": options.rounds, "device": runner.device_name(options.device),
            "threads": torch.get_num_threads(), **provenance(),
        }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    for name, one in result["rows"].items():
        print(f"{name:40} {one['ms']:8.2f} ms  [{one['low']:.2f}, {one['high']:.2f}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
