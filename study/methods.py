"""Rebuild the tables of docs/methods.md between markers from study/results/methods/*.json; --check only compares.

    python -m study.methods [--check]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study.generated import ROOT, check_or_write, with_blocks

RESULTS = ROOT / "study" / "results" / "methods"
PAGE = ROOT / "docs" / "methods.md"
SLOWER = 1.10  # times what its FLOPs promise: worth a word in the page


def name_of(row: dict[str, Any]) -> str:
    """The method, and what parts it from its like.

    >>> name_of({"method": "tome", "settings": {"n_keep": 64, "place": "after_tower"}})
    '`tome` after the tower'
    """
    besides = {("place", "after_tower"): " after the tower", ("n_fusion", 0): " without pre-fusion", ("plus", True): " plus"}
    return f"`{row['method']}`" + "".join(word for pair, word in besides.items() if pair in row["settings"].items())


def table(result: dict[str, Any]) -> str:
    """One result file as Markdown: a line per method and budget; ratios are to `none` in the same run."""
    none, *rows = result["rows"]
    head = ("method", "budget", "mean tokens", "prefill", "FLOPs promised", "FLOPs counted", "over promise", "decode", "again")
    lines = [
        f"**{result['shape']}**: {result['device']}, {result['dtype']}, {none['schedule'][0]} patches, "
        f"{result['n_text']} words, {result['decoder']['n_layers']} layers of width {result['decoder']['width']}; `none` takes "
        f"{none['prefill_ms']:,.0f} ms to the first token and {none['decode_ms']:.1f} ms for each later one"
        + {"wall": ".", "cpu": ", in CPU time: the machine was busy."}[result["clock"]],
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    for row in rows:
        times_promised = row["prefill_ratio"] / row["promised_ratio"]
        over = f"**{times_promised:.2f}**" if times_promised > SLOWER else f"{times_promised:.2f}"
        again = "" if row["again_ms"] is None else f"{row['again_ms'] / none['prefill_ms']:.2f}"
        cells = (
            name_of(row), str(row["budget"]), f"{row['equivalent_tokens']:.1f}", f"{row['prefill_ratio']:.2f}",
            f"{row['promised_ratio']:.2f}", f"{row['counted_ratio']:.2f}", over,
            f"{row['decode_ratio']:.2f}", again,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times() -> str:
    """All result files, one after the other."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(table(json.loads(file.read_text())) for file in files) or "No run yet."


BLOCKS = {"times": times}


def files() -> dict[Path, str]:
    """docs/methods.md, its tables made anew."""
    return with_blocks(PAGE, BLOCKS)


if __name__ == "__main__":
    raise SystemExit(check_or_write(files, __doc__))
