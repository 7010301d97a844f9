"""What each method costs at a token budget: tokens per layer, FLOPs, bytes; all counted the same way.

Source:  ops/cost.py (FLOPs and bytes); each method's `for_budget` for its settings.
Differs: tokens are those *entering* each layer and are averaged over layers; where authors count otherwise, their number
         stands beside it. Layers before the language model that read patches and text (LLaVA-Mini's pre-fusion) count in
         the FLOPs, not in the tokens. Not counted: the vision tower, the projector, anchors, and a method's own scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from htc_vlm import compressors
from htc_vlm.compressors import Compressor
from htc_vlm.ops import cost
from htc_vlm.tokens import equivalent_tokens


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


def row_of(method: Compressor, settings: dict[str, Any], n_patches: int, shape: cost.DecoderShape, n_text: int) -> Row:
    """What one method costs."""
    schedule = method.schedule(n_patches, shape.n_layers)
    cached = method.cached_tokens(n_patches, shape.n_layers)
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
        authors_tokens=method.authors_tokens(schedule),
        prefill_tflops=first / 1e12,
        again_tflops=again / 1e12,
        cache_mib=cost.cache_bytes(shape, cached) / 2**20,
        question_independent=method.question_independent,
    )


def rows(
    budget: float,
    n_patches: int,
    shape: cost.DecoderShape,
    n_text: int,
    refusal: Callable[[Compressor], str | None] = lambda method: None,
) -> tuple[list[Row], dict[str, str]]:
    """Every registered method at `budget` (tokens, or a share of the patches), dearest first, and why others are missing:
    no settings for the budget, or a `refusal` of the model."""
    found, missing = [], {}
    for name in compressors.names():
        try:
            settings = compressors.get(name).for_budget(budget, n_patches, shape.n_layers)
            for variant in ({}, *compressors.get(name).VARIANTS):
                own = {**settings, **variant}
                method = compressors.build(name, **own)
                reason = refusal(method)
                if reason is None:
                    found.append(row_of(method, own, n_patches, shape, n_text))
                else:
                    missing[" ".join((name, *variant))] = reason
        except ValueError as error:
            missing[name] = str(error)
    return sorted(found, key=lambda row: (-row.equivalent_tokens, row.method)), missing


def runs(schedule: Sequence[int]) -> str:
    """A schedule in short.

    >>> runs([576, 576, 30, 30, 30])
    '576 x2, 30 x3'
    """
    return ", ".join(f"{n} x{len(list(group))}" for n, group in itertools.groupby(schedule))


def unit_of(largest: float, units: Sequence[str], step: float, at_least: float = 0.1) -> tuple[str, float]:
    """The largest unit in which a number is `at_least` so large, and the factor to it from the first unit.

    >>> unit_of(8.2, ("TFLOPs", "GFLOPs"), 1000), unit_of(0.004, ("TFLOPs", "GFLOPs"), 1000)
    (('TFLOPs', 1), ('GFLOPs', 1000))
    """
    power = 0
    while largest * step**power < at_least and power < len(units) - 1:
        power += 1
    return units[power], step**power


def to_markdown(table: Sequence[Row]) -> str:
    """Rows as a Markdown table, in units that fit the model."""
    flops, by = unit_of(max((row.prefill_tflops for row in table), default=1), ("TFLOPs", "GFLOPs", "MFLOPs"), 1000)
    memory, times = unit_of(max((row.cache_mib for row in table), default=1), ("MiB", "KiB"), 1024, at_least=10)
    head = ("method", "settings", "tokens x layers", "mean", "authors' own", flops, f"{flops} again", f"KV {memory}",
            "any question")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
        cells = (
            row.method,
            settings,
            runs(row.schedule),
            f"{row.equivalent_tokens:.1f}",
            "" if row.authors_tokens is None else f"{row.authors_tokens:.1f}",
            f"{row.prefill_tflops * by:.3f}",
            f"{row.again_tflops * by:.3f}",
            f"{row.cache_mib * times:.1f}",
            "yes" if row.question_independent else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
