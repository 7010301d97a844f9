"""Rebuild the block of docs/store.md that says what the store's trials gave, from study/results/store; --check only compares.

    python -m study.store_page [--check]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study.generated import ROOT, check_or_write, with_blocks


def dtypes(result: dict[str, Any]) -> str:
    splits = {"test": "styles seen in training", "test-unseen": "an unseen style"}
    lines = [
        "| dtype | bytes a picture | computed for 7B | points lost, seen | points lost, unseen | same answers |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    at_7b = result["computed_at_7b"]
    for name, row in result["test"]["dtypes"].items():
        lost = []
        for split in splits:
            one = result[split]["dtypes"][name]
            lost.append(f"{one['points_lost']:.1f} ({one['low']:.1f} to {one['high']:.1f})")
        big = at_7b["bfloat16"] if name == "model" else at_7b[name]
        lines.append(f"| {name} | {row['bytes_per_image']:,} | {big:,} | {' | '.join(lost)} | {row['same_answers']:.1f} % |")
    n = result["test"]["questions"]
    right = ", ".join(f"{result[split]['dtypes']['model']['right']:.1f} % on {what}" for split, what in splits.items())
    return "\n".join(lines) + (
        f"\n\n`{result['model']}` on {n:,} questions a split (95 % intervals over pictures); unpacked it is right in {right}. "
        f"int2's levels are calibrated on {result['calibrated_on']} training pictures."
    )


def entries(result: dict[str, Any]) -> str:
    lines = [
        f"| {result['images']:,} pictures | MB on disk | rows/s written | ms a read | ms of 32 | ms a read, beside a writer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["dtypes"].items():
        both = row["two_readers_one_writer"]
        lines.append(
            f"| {name}, {row['bytes_per_image']:,} bytes | {row['mb_on_disk']:,} | {row['rows_per_second']:,} | "
            f"{row['read_ms']['median']} | {row['read_32_ms']['median']} | {both['read_ms']['median']} |"
        )
    shared = f"on {result['cpus']} cores that other work shared (load average {result['load_average']:.0f})"
    return "\n".join(lines) + f"\n\nMedians, {shared}; beside a writer, two processes read."


def kill(result: dict[str, Any]) -> str:
    return (
        f"Two writers killed ({result['kills']} kill -9): of {result['acknowledged']:,} acknowledged images "
        f"{result['lost']} lost, {result['wrong']} wrong."
    )


def damage(result: dict[str, Any]) -> str:
    told = result["of_them"]
    named = told["images_named"] + told["file_named"]
    return (
        f"A byte of {result['flipped']} images flipped: {result['found']} found, {result['given_wrong']} given. "
        f"Of {result['flips_anywhere']} flips anywhere in the files, {told['harmless']} hit nothing that is read, {named} were "
        f"named, {told['given_wrong']} gave a wrong image."
    )


def batch(result: dict[str, Any]) -> str:
    killed = result["killed"]
    return (
        f"A batch of {result['pictures']:,} pictures, {result['broken']} of them broken, killed at {killed['at'][0]} and "
        f"{killed['at'][1]}: {killed['distinct_rows']:,} of {killed['expected_rows']:,} rows, each once, {killed['refused']} "
        "pictures refused."
    )


def memory(result: dict[str, Any]) -> str:
    at = [f"{now['peak_mb']:,} MB after {int(mark):,}" for mark, now in result["at"].items()]
    speed = f"{result['end']['per_second']} pictures/s at a load average of {result['load_average']:.0f}"
    return (
        f"A run over {result['pictures']:,} pictures without a stop ({speed}): most memory so far {', '.join(at)}."
    )


def ray(result: dict[str, Any]) -> str:
    stores = "the same" if result["same_images"] else "other"
    return (
        f"{result['pictures']} pictures by the embedded engine and by Ray with {result['actors']} actors: "
        f"{result['same_rows']} of {result['rows']} rows are equal; the stores hold {stores} ids."
    )


PARTS = {
    "dtypes": dtypes, "entries": entries, "kill": kill, "damage": damage, "batch": batch, "memory": memory, "ray": ray,
}  # fmt: skip
RESULTS = ROOT / "study" / "results" / "store"


def trials() -> str:
    """What the result files say; trials without a file are left out."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    return "\n\n".join(make(found[name]) for name, make in PARTS.items() if name in found)


BLOCKS = {"trials": trials}


def files() -> dict[Path, str]:
    """docs/store.md, its trials made anew."""
    return with_blocks(ROOT / "docs" / "store.md", BLOCKS)


if __name__ == "__main__":
    raise SystemExit(check_or_write(files, __doc__))
