"""`htc-vlm cost MODEL --budget 64`: what each method costs at a budget, all counted the same way.

Source:  ops/cost.py (FLOPs and bytes), ops/schedules.py (the published settings of each budget, with their sources).
Differs: tokens are those *entering* each layer and are averaged over layers; where authors count otherwise, their number
         stands beside it. Layers before the language model that read patches and text (LLaVA-Mini's pre-fusion) count in
         the FLOPs, not in the tokens. Not counted: the vision tower, the projector, anchors, and a method's own scores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from htc_vlm import compressors
from htc_vlm.compressors import Compressor
from htc_vlm.ops import cost, schedules
from htc_vlm.tokens import equivalent_tokens

LLAVA_7B = "llava-1.5-7b"
PUBLISHED = (schedules.PUBLISHED_PATCHES, schedules.PUBLISHED_LAYERS)


@dataclass(frozen=True)
class Row:
    """One method with its settings. TFLOPs are of the language model, for one image and the text."""

    method: str
    settings: dict[str, Any]
    schedule: list[int]
    equivalent_tokens: float
    authors_tokens: float | None  # where the authors count otherwise
    prefill_tflops: float  # the first question
    again_tflops: float  # the next question about the same image, its keys and values kept
    cache_mib: float
    question_independent: bool


def settings_for(name: str, budget: int, n_patches: int, n_layers: int) -> dict[str, Any]:
    """The settings with which a method comes to `budget` tokens; ValueError where none are known.

    >>> settings_for("visionzip", 64, 576, 32), settings_for("fastv", 64, 576, 32)
    ({'n_dominant': 54, 'n_contextual': 10}, {'n_keep': 30, 'layer': 2})
    """
    scale = n_layers / schedules.PUBLISHED_LAYERS
    if name == "none":
        return {}
    if name in ("random_drop", "divprune", "tome"):
        return {"n_keep": budget}
    if name in ("voco", "htc"):
        return {"n_bottleneck": budget}
    if name == "qformer":
        return {"n_queries": budget}
    if name in ("avg_pool", "llava_mini"):
        return {"n_tokens": round(math.sqrt(budget)) ** 2}  # the nearest square
    if name == "visionzip":
        if budget < 2:
            raise ValueError("visionzip: 2 tokens are the fewest, the class token and the patch that it looks at most")
        n_dominant = max(2, round(budget * 27 / 32))  # the released 162 + 30, 108 + 20, 54 + 10
        return {"n_dominant": n_dominant, "n_contextual": max(0, budget - n_dominant)}
    if name == "fastv":
        layer = max(1, round(2 * scale))
        return {"n_keep": schedules.fastv_keep(n_patches, n_layers, budget, layer), "layer": layer}
    if name == "pyramid_drop":
        if (n_patches, n_layers) == PUBLISHED and budget in schedules.PYRAMID_DROP:
            stages, ratio = schedules.PYRAMID_DROP[budget]
            return {"stages": stages, "ratio": ratio}
        stages = tuple(max(1, round(stage * scale)) for stage in (2, 8, 16))
        return {"stages": stages, "ratio": schedules.pyramid_drop_ratio(n_patches, n_layers, stages, budget)}
    if name == "sparse_vlm":
        if (n_patches, n_layers) == PUBLISHED:
            schedules.sparse_vlm_budget(budget, n_patches, n_layers)
            return {"budget": budget}
        share = round(budget * schedules.PUBLISHED_PATCHES / n_patches)  # the published budget of this share
        scaled = schedules.sparse_vlm_scaled(share, n_patches, n_layers)
        return {"layers": scaled.layers, "keep": scaled.keep}
    raise ValueError(f"no settings of {name} are known for a budget")


def row_of(method: Compressor, settings: dict[str, Any], n_patches: int, shape: cost.DecoderShape, n_text: int) -> Row:
    """What one method costs."""
    schedule = method.schedule(n_patches, shape.n_layers)
    cached = method.cached_tokens(n_patches, shape.n_layers)
    authors = None
    if method.n_bottleneck:
        authors = float(method.n_bottleneck)
    elif method.name == "sparse_vlm":
        authors = equivalent_tokens(schedules.leaving(schedule))
    if method.n_bottleneck:  # the image alone, then the text over what is left of it
        image = cost.prefill_flops(shape, schedule, n_text=0)
        again = cost.prefill_flops(shape, [0] * shape.n_layers, n_text, n_logits=1, n_past=cached[0])
        first = image + again
    else:
        first = cost.prefill_flops(shape, schedule, n_text, n_logits=1)
        if method.n_fusion:
            own = replace(shape, n_layers=method.n_fusion)
            first += cost.prefill_flops(own, method.fusion_schedule(n_patches), n_text)
        again = first
        if method.question_independent:  # the image is a prefix of the prompt: keep its keys and values
            again = cost.prefill_flops(shape, [0] * shape.n_layers, n_text, n_logits=1, n_past=cached[0])
    return Row(
        method=method.name,
        settings=settings,
        schedule=schedule,
        equivalent_tokens=equivalent_tokens(schedule),
        authors_tokens=authors,
        prefill_tflops=first / 1e12,
        again_tflops=again / 1e12,
        cache_mib=cost.cache_bytes(shape, cached) / 2**20,
        question_independent=method.question_independent,
    )


def rows(budget: int, n_patches: int, shape: cost.DecoderShape, n_text: int) -> tuple[list[Row], dict[str, str]]:
    """Every registered method at `budget`, dearest first, and why others are missing."""
    found, missing = [], {}
    for name in compressors.names():
        try:
            settings = settings_for(name, budget, n_patches, shape.n_layers)
            found.append(row_of(compressors.build(name, **settings), settings, n_patches, shape, n_text))
            if name == "sparse_vlm" and "budget" in settings:
                settings = {**settings, "plus": True}
                found.append(row_of(compressors.build(name, **settings), settings, n_patches, shape, n_text))
            if name == "llava_mini":  # its ablation: without pre-fusion
                settings = {**settings, "n_fusion": 0}
                found.append(row_of(compressors.build(name, **settings), settings, n_patches, shape, n_text))
        except ValueError as error:
            missing[name] = str(error)
    return sorted(found, key=lambda row: (-row.equivalent_tokens, row.method)), missing


def runs(schedule: Sequence[int]) -> str:
    """A schedule in short.

    >>> runs([576, 576, 30, 30, 30])
    '576 x2, 30 x3'
    """
    return ", ".join(f"{n} x{len(list(group))}" for n, group in itertools.groupby(schedule))


def to_markdown(table: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    head = ("method", "settings", "tokens x layers", "mean", "authors' own", "TFLOPs", "TFLOPs again", "KV MiB", "any question")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
        cells = (
            row.method,
            settings,
            runs(row.schedule),
            f"{row.equivalent_tokens:.1f}",
            "" if row.authors_tokens is None else f"{row.authors_tokens:.1f}",
            f"{row.prefill_tflops:.3f}",
            f"{row.again_tflops:.3f}",
            f"{row.cache_mib:.1f}",
            "yes" if row.question_independent else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def find_shape(model: str) -> tuple[int, cost.DecoderShape]:
    """(P, decoder) of a model: `llava-1.5-7b` without any file, else a shipped checkpoint or a folder."""
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
    parser.add_argument("--budget", type=int, default=64, help="visual tokens per image (mean over layers)")
    parser.add_argument("--text", type=int, default=40, help="tokens of the question and its template")
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    args = parser.parse_args(argv)
    n_patches, shape = find_shape(args.model)
    if not 1 <= args.budget <= n_patches or args.text < 1:
        raise ValueError(f"--budget must be 1 to {n_patches} (the patches of {args.model}) and --text at least 1")
    table, missing = rows(args.budget, n_patches, shape, args.text)
    if args.format == "json":
        print(json.dumps({"rows": [asdict(row) for row in table], "missing": missing}, indent=1))
        return 0
    print(to_markdown(table), end="")
    for name, why in missing.items():
        print(f"\nnot at this budget: {name} ({why})")
    return 0
