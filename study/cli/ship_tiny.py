"""`python -m study ship-tiny NAME --run DIR`: what is committed of a shipped tiny model, made from a run.

Source:  ours.
Differs: nothing known.

Three calls, with a commit after the first, so that results name a commit that holds the weights. study/ship_tiny.sh does all.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def run(argv: list[str]) -> int:
    """--run: checkpoint and training record into the repository. --evaluate: whole test sets. --collect: their results, too."""
    parser = argparse.ArgumentParser(prog="python -m study ship-tiny", description=run.__doc__)
    parser.add_argument("name", help="of the shipped model: tiny, tiny-upper, tiny-htc")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run of train-tiny, also one that is not finished")
    parser.add_argument("--record", default="training", help="folder of the record (default: training)")
    parser.add_argument("--entries", type=int, metavar="N", help="of an elastic run: ship its first N entries (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="the shipped model's answers, into --work")
    parser.add_argument("--collect", action="store_true", help="results from --work into study/results/tiny")
    parser.add_argument("--tests", default="0,1,2,3", help="0: seen vendors, 1: unseen vendor, 2: easy-vqa, 3: fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("runs/eval"), help="where an evaluation lies and goes on")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: $HTC_VLM_DATA or data)")
    parser.add_argument("--batch-size", type=int, default=192, help="questions asked at once")
    args = parser.parse_args(argv)
    if args.run is None and not args.evaluate and not args.collect:
        raise ValueError("nothing to do: give --run DIR; or --evaluate and --collect once the checkpoint is committed")
    from study.fast_trainer import ship

    tests = [int(number) for number in args.tests.split(",")]
    if unknown := [number for number in tests if not 0 <= number < len(ship.TESTS)]:
        raise ValueError(f"--tests: there is no {unknown[0]}; known: 0 to {len(ship.TESTS) - 1}")
    data = args.data or Path(os.environ.get("HTC_VLM_DATA", "data"))
    if args.run is not None:
        ship.ship(args.run, args.name, args.record, args.entries)
    if args.evaluate:
        ship.evaluate(args.name, args.work, data, args.batch_size, tests)
    if args.collect:
        for file in ship.collect(args.name, args.work, data):
            print(file)
    return 0
