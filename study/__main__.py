"""`python -m study COMMAND ...`: the study's commands, run from the root of a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import htc_vlm_cli

COMMANDS = {
    "train-and-eval": "build the missing results of the study, row by row",
    "train-tiny": "train a tiny model by the fast trainer",
    "export-tiny": "a run's state as a checkpoint",
    "step-time": "how long a training step of some rows takes, in turn",
    "ship-tiny": "a run's checkpoint, record and evaluation into the repository",
    "table": "rebuild a table from the result files",
    "store-trials": "kill writers, flip bytes, fill a store, count points lost by dtype, run a batch",
    "probe": "read what the bottleneck token has kept",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, as `htc-vlm` does."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(htc_vlm_cli.usage(COMMANDS).replace("htc-vlm COMMAND", "python -m study COMMAND"))
        return 0
    if name not in COMMANDS:
        print(htc_vlm_cli.unknown(name, COMMANDS), file=sys.stderr)
        return htc_vlm_cli.EXIT_REFUSED
    return htc_vlm_cli.run_module(f"study.cli.{htc_vlm_cli.module(name)}", name, rest)


if __name__ == "__main__":
    sys.exit(main())
