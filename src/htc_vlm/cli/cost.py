"""`htc-vlm cost MODEL --budget 64`: what each method costs at a budget, all counted the same way (applied/cost_table.py)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from htc_vlm import settings

LLAVA_7B = "llava-1.5-7b"


def find_shape(model: str) -> tuple[int, Any]:
    """(P, decoder) of a model: `llava-1.5-7b` without any file, else a shipped checkpoint or a folder."""
    from htc_vlm.ops import cost, schedules

    if model == LLAVA_7B:
        return schedules.PUBLISHED_PATCHES, cost.LLAMA_7B
    from htc_vlm.model.configuration import HtcVlmConfig
    from htc_vlm.model.loading import find
    from htc_vlm.model.modeling import sizes_of

    config = HtcVlmConfig.from_pretrained(find(model))
    return sizes_of(config).n_patches, cost.DecoderShape.from_config(config.text_config)


def run(argv: list[str]) -> int:
    """Print tokens per layer, FLOPs of the language model and bytes of its cache, for every method at one budget."""
    parser = argparse.ArgumentParser(prog="htc-vlm cost", description=run.__doc__)
    parser.add_argument("model", help=f"{LLAVA_7B}, or a shipped checkpoint's name or a path")
    parser.add_argument("--budget", type=settings.budget, default=64,
                        help="visual tokens per image (mean over layers), or a share of the patches such as 0.11")  # fmt: skip
    parser.add_argument("--text", type=int, default=40, help="tokens of the question and its template")
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    args = parser.parse_args(argv)
    from htc_vlm.applied import cost_table
    from htc_vlm.compressors import budget_tokens

    n_patches, shape = find_shape(args.model)
    if args.text < 1:
        raise ValueError(f"--text is {args.text}; give at least 1")
    budget_tokens("--budget", args.budget, n_patches)
    table, missing = cost_table.rows(args.budget, n_patches, shape, args.text)
    if args.format == "json":
        print(json.dumps({"rows": [asdict(row) for row in table], "missing": missing}, indent=1))
        return 0
    print(cost_table.to_markdown(table), end="")
    for name, why in missing.items():
        print(f"\nnot at this budget: {name} ({why})")
    return 0
