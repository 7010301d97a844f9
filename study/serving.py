"""Rebuild the measured block of docs/serving.md from study/results/serve/cpu.json; --check only compares.

    python -m study.serving [--check]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study.generated import ROOT, check_or_write, with_blocks

RESULT = ROOT / "study" / "results" / "serve" / "cpu.json"
PAGE = ROOT / "docs" / "serving.md"
WAYS = {
    "batched": "{} clients, pictures in the store",
    "one_at_a_time": "{} client, pictures in the store",
    "reencoded": "{} clients, each picture sent and compressed with each question",
}


def block(result: dict[str, Any]) -> str:
    """Markdown: a table of rates and a sentence each on answers and soak."""
    lines = ["| | requests/s | p50, ms | p95, ms |", "|---|---:|---:|---:|"]
    for name, what in WAYS.items():
        one = result["rates"][name]
        lines.append(f"| {what.format(one['clients'])} | {one['per_s']} | {one['p50_ms']:.0f} | {one['p95_ms']:.0f} |")
    answers, machine = result["answers"], result["machine"]
    lines += [
        "",
        f"`{result['model']}`; {machine['cores']} cores that clients, server and other work shared (load average "
        f"{machine['load_average'][0]:.0f}): read the rows against each other. Of {answers['requests']:,} answers about "
        f"{result['pictures']} pictures, all to the same question, {answers['equal_to_alone']:,} were those of the picture "
        f"asked alone ({answers['different_answers']} different ones).",
    ]
    if "soak" in result:
        lines += ["", soaked(result["soak"])]
    return "\n".join([*lines, "", f"`{result['command']}`"])


def soaked(soak: dict[str, Any]) -> str:
    """A paragraph."""
    said, mib = soak["said"], soak["mib"]
    n_hang_ups, n_bad = (sum(n for kind, n in said.items() if kind.startswith(name)) for name in ("hang-up", "bad body"))
    return (
        f"A soak of {soak['seconds']:.0f} s: {said['200']:,} answers ({soak['wrong_answers']} wrong), {said.get('429', 0):,} "
        f"times 429 from a queue of 48, {n_hang_ups:,} clients that hung up, {n_bad:,} bad bodies. p50 {soak['p50_ms']:.0f} "
        f"ms, p95 {soak['p95_ms']:.0f} ms; memory {mib['first_third']:.0f} MiB in the first third and "
        f"{mib['last_third']:.0f} in the last; {soak['left_behind']['waiting_rows']:.0f} rows left behind."
    )


BLOCKS = {"measured": lambda: block(json.loads(RESULT.read_text(encoding="utf-8")))}


def files() -> dict[Path, str]:
    """docs/serving.md, its measured block made anew."""
    return with_blocks(PAGE, BLOCKS)


if __name__ == "__main__":
    raise SystemExit(check_or_write(files, __doc__))
