"""`python -m study step-time study/experiments/long/*.yaml`: how long a training step of each row takes, all rows in turn.

Source:  ours. Rows take turns step by step, so that other work on the machine slows all of them alike.
Differs: not compiled, unless asked: compiling all rows takes longer than measuring them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(argv: list[str]) -> int:
    """Time training steps of rows of the fast trainer in turn; writes medians and their ratios to the first row."""
    parser = argparse.ArgumentParser(prog="python -m study step-time", description=run.__doc__)
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROW.yaml", help="rows of study/experiments")
    parser.add_argument("--output", type=Path, default=Path("study/results/long/step_time.json"))
    parser.add_argument("--steps", type=int, default=20, help="of each row, after two that are not counted")
    parser.add_argument("--compile", action="store_true", help="compile every row first (minutes each)")
    parser.add_argument("--cache", type=Path, default=Path("runs/experiments/cache"), help="features, codes and questions")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"), help="where quantizers are made")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: $HTC_VLM_DATA or data)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; give at least 1")
    import torch

    from htc_vlm.eval.run_info import provenance
    from htc_vlm.files import write_json
    from study.definitions import read_experiment

    os.environ["HTC_VLM_DATA"] = str(args.data or os.environ.get("HTC_VLM_DATA", "data"))
    experiments = [read_experiment(path) for path in args.rows]
    untrained = [one.name for one in experiments if one.run is None]
    experiments = [one for one in experiments if one.run is not None]
    if untrained:
        print(f"not trained by the fast trainer, so without a step to time: {', '.join(untrained)}", flush=True)
    if not experiments or len({one.row for one in experiments}) < len(experiments):
        raise ValueError("give rows of one table that the fast trainer trains, each once (study/experiments/long)")
    steps = {one.row: _stepper(one, args.cache, args.work, args.compile) for one in experiments}
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    for number in range(args.steps + 2):
        for row, step in steps.items():
            started = time.perf_counter()
            step(number)
            if number >= 2:
                seconds[row].append(time.perf_counter() - started)
    medians = {row: statistics.median(times) for row, times in seconds.items()}
    first = medians[experiments[0].row]
    write_json(args.output, {
        "rows": {row: {"median_s": round(one, 5), "ratio": round(one / first, 4)} for row, one in medians.items()},
        "ratio_to": experiments[0].row, "steps": args.steps, "compiled": args.compile, "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0], "seconds": {row: [round(t, 5) for t in times] for row, times in seconds.items()},
        **provenance(),
    }, indent=1)  # fmt: skip
    for row, one in medians.items():
        print(f"{row}: {1000 * one:.0f} ms, {one / first:.3f} of {experiments[0].row}")
    return 0


def _stepper(experiment: Any, cache: Path, work: Path, compiled: bool) -> Callable[[int], float]:
    """step(number): train this row's model by one step on the first data set."""
    import torch

    from study.fast_trainer import train as fast
    from study.fast_trainer.data import batch, cells_of_patches, training_pictures
    from study.fast_trainer.weights import fast_model
    from study.jobs import fast_run

    run = fast_run(experiment, seed=1)
    library, processor = fast.starting_model(run, work)
    pictures = training_pictures(run, run.parts[0], library, processor.tokenizer, cache)
    model = fast_model(library, reads_turn=run.turn_loss > 0, seed=run.seed)
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer, cells = fast.optimizer_of(run, model), cells_of_patches(pictures.cache.meta.n_patches)

    def step(number: int) -> float:
        seen, rng = batch(run, [pictures], number, processor.tokenizer.eos_token_id)
        return fast.one_step(run, model, forward, optimizer, seen, int(rng.choice(model.method.budgets)), number, cells)

    return step
