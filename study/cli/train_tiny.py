"""`python -m study train-tiny study/experiments/tiny/tiny.yaml --out DIR`: train a tiny model by the fast trainer.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def run(argv: list[str]) -> int:
    """Train one tiny model; leaves DIR/model, a checkpoint, and its record. What was cut off goes on with --resume."""
    parser = argparse.ArgumentParser(prog="python -m study train-tiny", description=run.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="settings (study/experiments/tiny)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--cache", type=Path, help="features, codes and questions (default: cache beside --out)")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: $HTC_VLM_DATA or data)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. steps=100")
    args = parser.parse_args(argv)
    from study.fast_trainer.settings import read_run
    from study.fast_trainer.train import train

    settings = read_run(args.run, args.set)
    data = args.data or Path(os.environ.get("HTC_VLM_DATA", "data"))
    report = train(settings, args.out, args.cache or args.out.parent / "cache", data, args.resume)
    print(f"{args.out / 'model'}: {report['steps']} steps, {report['seconds']:.0f} s, loss {report['loss']}")
    return 0
