"""`python -m study export-tiny DIR MODEL`: the last saved state of a run as a checkpoint, also of one that still runs.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def run(argv: list[str]) -> int:
    """Write a checkpoint folder from a run's state.pt."""
    parser = argparse.ArgumentParser(prog="python -m study export-tiny", description=run.__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run of train-tiny")
    parser.add_argument("model", type=Path, help="checkpoint folder to write")
    args = parser.parse_args(argv)
    from study.fast_trainer.ship import export_state

    step = export_state(args.folder, args.model)
    print(f"{args.model}: the weights after step {step}")
    return 0
