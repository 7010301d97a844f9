"""htc-vlm compare: the difference of two results of `htc-vlm eval` on the same questions, with a paired bootstrap interval."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from htc_vlm.eval.compare import Comparison, compare_outputs


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm compare", description=__doc__)
    arguments.add_argument("first", type=Path, help="an --output of htc-vlm eval, or one task's folder in it")
    arguments.add_argument("second", type=Path, help="another one")
    arguments.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    arguments.add_argument("--resamples", type=int, default=10_000, help="draws of pictures (default: 10000)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--format", choices=("markdown", "json"), default="markdown")
    return arguments


def to_markdown(comparisons: Sequence[Comparison], level: float) -> str:
    """One line per task; percentages, differences in points."""
    head = ("task", "questions", "pictures", "first", "second", f"first - second [{level:.0%}]", "score of first, second")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in comparisons:
        gain = one.difference
        cells = (
            one.task,
            str(gain.n_questions),
            str(gain.n_images),
            *(f"{side.percent:.2f} [{side.low:.2f}, {side.high:.2f}]" for side in (one.first, one.second)),
            f"{gain.points:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]",
            f"{one.first_score:.2f}, {one.second_score:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(argv: list[str]) -> int:
    """0: all tasks compared; 1: some; ValueError: none."""
    options = parser().parse_args(argv)
    if not 0 < options.level < 1 or options.resamples < 100:
        raise ValueError(f"--level {options.level}, --resamples {options.resamples}: give 0 < level < 1, and 100 or more")
    found = dict(
        compare_outputs(
            options.first, options.second, n_resamples=options.resamples, level=options.level, seed=options.seed
        )
    )  # fmt: skip
    done = [one for one in found.values() if isinstance(one, Comparison)]
    refused = {task: why for task, why in found.items() if isinstance(why, str)}
    if not done:
        raise ValueError("; ".join(f"{task}: {why}" for task, why in refused.items()))
    if options.format == "json":
        print(json.dumps({"level": options.level, "tasks": [asdict(one) for one in done], "refused": refused}, indent=1))
    else:
        print(to_markdown(done, options.level))
    for task, why in refused.items():
        print(f"htc-vlm compare: {task}: {why}", file=sys.stderr)
    return 1 if refused else 0
