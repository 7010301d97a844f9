"""`python -m study train-and-eval study/experiments/table1/*.yaml --seeds 0,1,2`: build what is missing.

Source:  ours.
Differs: nothing known.

What is there is left alone; what was cut off goes on; what was made under another config is an error, before anything
is run. With --parallel each run is a process of its own, so that many tiny ones share a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.definitions import DEFAULTS, RUNS, TABLES, Experiment, followed, read_experiment

EXIT_LEFT, EXIT_FAILED = 3, 1  # runs are left for a later start; a run failed
POLL_SECONDS = 0.2
CHILD = "import sys; from study.__main__ import main; sys.exit(main(sys.argv[1:]))"


class TimeUp(BaseException):
    """The time limit has passed. No Exception: nothing on the way may catch it."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """One run: the experiment, the file that defines it, and the seed."""

    experiment: Experiment
    file: Path
    seed: int


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m study train-and-eval", description=run.__doc__)
    arguments.add_argument("experiments", nargs="+", type=Path, help="experiments/<table>/<row>.yaml, as many as wanted")
    arguments.add_argument("--seeds", default="0", help="by commas (default: 0)")
    arguments.add_argument("--output", type=Path, default=Path("study/results"), help="result files (default: study/results)")
    arguments.add_argument("--work", type=Path, default=Path("runs/experiments"), help="checkpoints, logs and answers")
    arguments.add_argument("--cache", type=Path, help="the tower's features (default: WORK/cache)")
    arguments.add_argument("--data", type=Path, help="folder of the data sets (default: $HTC_VLM_DATA or data)")
    arguments.add_argument("--device", help="cpu, cuda, ... for features and evaluation (default: a GPU if there is one)")
    arguments.add_argument("--batch-size", type=int, default=192, help="questions asked at once")
    arguments.add_argument("--parallel", type=int, default=1, help="runs at the same time, each a process")
    arguments.add_argument("--time-limit", type=float, metavar="MINUTES", help="stop then; start again to go on")
    arguments.add_argument("--dry-run", action="store_true", help="check everything, say what would be run")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. training.steps=100")
    return arguments


def seeds_of(text: str) -> list[int]:
    """
    >>> seeds_of("0,1,2")
    [0, 1, 2]
    """
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--seeds takes whole numbers by commas, got {text!r}") from error


def wanted_runs(files: Sequence[Path], seeds: Sequence[int], overrides: Sequence[str]) -> tuple[list[Wanted], list[str]]:
    """Every run once, the first seed of all rows before the second; and what is left out, with the reason."""
    runs: dict[tuple[str, int], Wanted] = {}
    remarks = []
    for number, seed in enumerate(seeds):
        for file in files:
            if file.name in (DEFAULTS, TABLES):
                raise ValueError(f"{file} defines no row; give experiments/<table>/<row>.yaml")
            if file.resolve().parent.name == RUNS:
                remarks.append(f"{file}: settings of train-tiny, no row")
                continue
            own, experiment = read_experiment(file, overrides), followed(file, overrides)
            if number and not depends_on_seed(experiment):
                remarks.append(f"{experiment.name}/{seed}: nothing is trained or drawn, one seed is enough")
                continue
            if number == 0 and own.same_as:
                remarks.append(f"{own.name}: shows the results of {own.same_as}")
            path = file.resolve().parent.parent / f"{experiment.name}.yaml"
            runs.setdefault((experiment.name, seed), Wanted(experiment, path, seed))
    return list(runs.values()), remarks


def depends_on_seed(experiment: Experiment) -> bool:
    """Is something trained, or drawn at random?"""
    if experiment.is_trained:
        return True
    return experiment.method is not None and experiment.method["name"] == "random_drop"


def command_of(wanted: Wanted, overrides: Sequence[str]) -> str:
    """What to type to build this result, from the root of the source."""
    row = f"study/experiments/{wanted.experiment.name}.yaml"
    words = ["python", "-m", "study", "train-and-eval", row, "--seeds", str(wanted.seed)]
    return shlex.join([*words, *(part for text in overrides for part in ("--set", text))])


@contextmanager
def alarm(minutes: float | None) -> Iterator[None]:
    """TimeUp is raised in this block after so many minutes."""

    def ring(number: int, frame: Any) -> None:
        raise TimeUp

    if minutes is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(60 * minutes, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(argv: list[str]) -> int:
    """Train and evaluate what is missing; started again, it goes on where it was cut off."""
    args = parser().parse_args(argv)
    if args.parallel < 1:
        raise ValueError(f"--parallel is {args.parallel}; give at least 1")
    runs, remarks = wanted_runs(args.experiments, seeds_of(args.seeds), args.set)

    from study.jobs import is_done, make_job
    from study.runner import prepare

    study = make_study(args)
    jobs = {wanted: make_job(wanted.experiment, wanted.seed, study) for wanted in runs}
    left = [wanted for wanted in runs if not is_done(jobs[wanted], study)]
    for remark in remarks:
        print(remark)
    names = ", ".join(jobs[wanted].name for wanted in left) or "none"
    print(f"{len(runs) - len(left)} of {len(runs)} results are there; to build: {names}", flush=True)
    if args.dry_run or not left:
        return 0
    built: list[Wanted] = []
    failed: list[str] = []
    try:
        with alarm(args.time_limit):
            prepare([jobs[wanted] for wanted in left], study)
            if args.parallel == 1:
                for wanted in left:
                    one_after_the_other(wanted, jobs[wanted], study, args.set, built, failed)
            else:
                side_by_side(left, args, built, failed)
    except TimeUp:
        print("the time is up")
    n_left = len(left) - len(built) - len(failed)
    print(f"{len(built)} built, {len(failed)} failed, {n_left} left" + ("; start again to go on" if n_left else ""))
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_LEFT if n_left else 0


def make_study(args: argparse.Namespace) -> Any:
    """Where things lie, and on what they run."""
    import torch

    from study.jobs import Study

    data = args.data or Path(os.environ.get("HTC_VLM_DATA", "data"))
    os.environ["HTC_VLM_DATA"] = str(data)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Study(
        work=args.work, results=args.output, cache=args.cache or args.work / "cache", data=data, device=device,
        batch_size=args.batch_size,
    )  # fmt: skip


def one_after_the_other(
    wanted: Wanted, job: Any, study: Any, overrides: Sequence[str], built: list[Wanted], failed: list[str]
) -> None:
    """One run in this process; a failure is noted and the next run begins."""
    from study.runner import run_job

    print(f"--- {job.name}", flush=True)
    try:
        result = run_job(job, study, command_of(wanted, overrides))
    except (ValueError, OSError, RuntimeError) as error:
        failed.append(f"{job.name}: {error}")
        return
    built.append(wanted)
    print(f"{job.name}: {told(result)}", flush=True)


def told(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "impossible" in result:
        return f"impossible: {result['impossible']}"
    scores = {name.removesuffix("/score"): value for name, value in result["metrics"].items() if name.endswith("/score")}
    return ", ".join(f"{name} {value:.1f}" for name, value in scores.items()) + f" ({result['seconds']:.0f} s)"


def side_by_side(left: Sequence[Wanted], args: argparse.Namespace, built: list[Wanted], failed: list[str]) -> None:
    """Runs as processes, `--parallel` at a time; each writes work/<table>/<row>/<seed>/log.txt."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.parallel))}
    waiting, running = list(left), dict[Wanted, tuple[Any, Path]]()
    try:
        while waiting or running:
            while waiting and len(running) < args.parallel:
                wanted = waiting.pop(0)
                log = args.work / wanted.experiment.name / str(wanted.seed) / "log.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as file:
                    process = subprocess.Popen(child_command(wanted, args), env=environment, stdout=file, stderr=file)
                running[wanted] = process, log
                print(f"--- {wanted.experiment.name}/{wanted.seed}: {log}", flush=True)
            for wanted, (process, log) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[wanted]
                name = f"{wanted.experiment.name}/{wanted.seed}"
                if process.returncode == 0:
                    built.append(wanted)
                else:
                    last = log.read_text(errors="replace").strip().splitlines()[-1:]
                    failed.append(f"{name}: {''.join(last)} (see {log})")
                print(f"{name}: exit code {process.returncode}", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def child_command(wanted: Wanted, args: argparse.Namespace) -> list[str]:
    """The same command for one run."""
    words = [sys.executable, "-c", CHILD, "train-and-eval", str(wanted.file), "--seeds", str(wanted.seed)]
    words += ["--output", str(args.output), "--work", str(args.work), "--batch-size", str(args.batch_size)]
    for name in ("cache", "data", "device"):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value is not None else []
    return words + [part for text in args.set for part in ("--set", text)]
