"""`python -m study store-trials NAME...`: what the store and the batch engine must hold, run and written down."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

RESULTS = Path("study/results/store")
NAMES = ("kill", "damage", "entries", "dtypes", "batch", "memory", "ray")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m study store-trials", description=__doc__)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a path (default: tiny)")
    arguments.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the result files (default: {RESULTS})")
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        raise ValueError(f"unknown trials: {', '.join(sorted(unknown))}; known: {', '.join(NAMES)}")
    from htc_vlm.eval.run_info import provenance
    from htc_vlm.files import write_json
    from study.store_trials import TRIALS

    options.output.mkdir(parents=True, exist_ok=True)
    made_by = provenance()  # before the first file is written over, which is a change of the checkout
    for name in options.names or NAMES:
        about = {"trial": name, "model": options.model, "cpus": os.cpu_count()}
        write_json(options.output / f"{name}.json", about | TRIALS[name](options.model) | made_by)
        print(options.output / f"{name}.json", flush=True)
    return 0
