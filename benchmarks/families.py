"""Times one prefill of each family with and without DivPrune, and ten questions from a cached image and from its pixels.

Random models at a small shape (8 layers of width 256); CPU seconds of one thread, so that a busy machine matters less.
`python -m benchmarks.families study/results/families/families.json`
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import htc_vlm
from htc_vlm.eval.run_info import provenance
from htc_vlm.ops import cost
from htc_vlm.testing import families
from htc_vlm.testing.families import FAMILIES, n_tokens, tiny_inputs, tiny_model
from htc_vlm.testing.processor import TinyProcessor

N_TOKENS, SHARE, N_QUESTIONS, N_NEW, REPEATS = 144, 0.11, 10, 2, 3


def cpu_seconds(call: Callable[[], object]) -> float:
    """Median of REPEATS, after one call that does not count."""
    call()
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def small_shape() -> None:
    """From the tests' tiny shape to one whose matrices are large enough to time; pictures of about N_TOKENS tokens."""
    families.TEXT.update(hidden_size=256, intermediate_size=768, num_hidden_layers=8)
    families.TEXT.update(num_attention_heads=32, num_key_value_heads=8)
    families.QWEN_VISION.update(out_hidden_size=256, num_heads=2)
    families.GRIDS[0] = (24, 24)
    families.TILES[0] = N_TOKENS // 16


def prefill(family: str) -> dict[str, Any]:
    """Several pictures in one prompt, about N_TOKENS visual tokens: stock beside DivPrune at SHARE of each."""
    model, one = tiny_model(family)
    batch = tiny_inputs(family, [[0] * max(1, round(N_TOKENS / n_tokens(one)[0]))])

    def run() -> None:
        model(**batch, logits_to_keep=1)

    stock, stock_flops = cpu_seconds(run), cost.count_flops(run)
    with htc_vlm.apply(model, "divprune", budget=SHARE) as applied:
        pruned, pruned_flops = cpu_seconds(run), cost.count_flops(run)
        kept = sum(layers[0] for layers in applied.schedules)
    return {
        "visual_tokens": n_tokens(batch)[0], "kept": kept, "stock_cpu_ms": round(1e3 * stock, 2),
        "pruned_cpu_ms": round(1e3 * pruned, 2), "time_ratio": round(pruned / stock, 3),
        "flops_ratio": round(pruned_flops / stock_flops, 3),
    }  # fmt: skip


def ten_questions(family: str) -> dict[str, Any]:
    """One picture and ten questions, one after the other: compressed once, or its pixels every time."""
    model, processor = tiny_model(family)[0], TinyProcessor(family)
    questions = [f"what is number {i} ?" for i in range(N_QUESTIONS)]
    text = [processor.chat_template.replace("QUESTION", question) for question in questions]

    def cached() -> None:
        kept = htc_vlm.compress(model, processor, [0], "divprune", budget=SHARE)
        for question in questions:
            htc_vlm.generate(model, processor, compressed=kept, text=[question], max_new_tokens=N_NEW)

    def anew() -> None:
        for prompt in text:
            with htc_vlm.apply(model, "divprune", budget=SHARE):
                model.generate(**processor([0], [prompt]), max_new_tokens=N_NEW, do_sample=False)

    def stock() -> None:
        for prompt in text:
            model.generate(**processor([0], [prompt]), max_new_tokens=N_NEW, do_sample=False)

    times = {name: cpu_seconds(call) for name, call in (("cached", cached), ("anew", anew), ("stock", stock))}
    taken = {f"{name}_cpu_ms": round(1e3 * seconds, 1) for name, seconds in times.items()}
    ratios = {f"cached_over_{name}": round(times["cached"] / times[name], 3) for name in ("anew", "stock")}
    return {"visual_tokens": n_tokens(processor([0], text[:1]))[0], **taken, **ratios}


@torch.no_grad()
def main() -> int:
    """Measures every family and writes the result file."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("output", type=Path, help="the result file, e.g. study/results/families/families.json")
    path = arguments.parse_args().output
    torch.set_num_threads(1)
    small_shape()
    clock = "process CPU time, one thread, median of 3"
    about = {"share": SHARE, "questions": N_QUESTIONS, "new_tokens": N_NEW, "clock": clock}
    result: dict[str, Any] = {"about": about, "prefill": {}, "ten_questions": {}}
    for part, measure in (("prefill", prefill), ("ten_questions", ten_questions)):
        for family in FAMILIES:
            result[part][family] = measure(family)
            print(part, family, result[part][family], flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | provenance(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
