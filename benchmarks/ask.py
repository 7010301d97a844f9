"""First-token time, decoding time and cache bytes: from the cache, text only, and uncompressed, as ratios from one run.

    python benchmarks/ask.py [--model tiny] [--batch 8] [--repeats 30] [--output study/results/ask/cpu.json]

Text only = the same question with no image at all. All are timed in turn within each repeat, so that a busy machine
disturbs them alike; medians. `answer_*` makes N_NEW tokens; `static` reserves the cache's room at once, which pays where
transformers compiles the decoding for it (a GPU).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from htc_vlm import load
from htc_vlm.cli.ask import cost
from htc_vlm.eval.run_info import provenance
from htc_vlm.model.answering import Answerer
from htc_vlm.model.loading import without_compression
from htc_vlm.tiny import pictograms

N_NEW = 16  # tokens of an answer whose decoding is timed


def time_in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--repeats", type=int, default=30)
    arguments.add_argument("--output", type=Path, default=Path("study/results/ask/cpu.json"))
    options = arguments.parse_args()

    model, processor = load(options.model)
    compressed = Answerer(model, processor)
    twin = without_compression(model)
    plain = Answerer(twin, processor.fitted_to(twin.config))
    question = "what is at the top left ?"
    questions, which = [question] * options.batch, list(range(options.batch))
    pictures = [pictograms.picture(f"test/{i}") for i in which]
    cells, features = compressed.encode(pictures), plain.encode(pictures)

    def text_only(n_new: int = 1) -> object:
        """The same question without an image, written and tokenised anew as the others are."""
        ids = torch.tensor([processor.question_ids(one, with_image=False) for one in questions])
        options = {"min_new_tokens": n_new, "max_new_tokens": n_new, "do_sample": False}
        return twin.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def answer(cache: str) -> object:
        """N_NEW tokens about the cells."""
        about = {**compressed.inputs(questions, is_compressed=True), "compressed": cells, "cache_implementation": cache}
        return model.generate(**about, min_new_tokens=N_NEW, max_new_tokens=N_NEW, do_sample=False)

    times = time_in_turn(
        {
            "from_cache": lambda: compressed.generate_ids(cells, which, questions, 1),
            "text_only": text_only,
            "uncompressed": lambda: plain.generate_ids(features, which, questions, 1),
            "answer_dynamic": lambda: answer("dynamic"),
            "answer_static": lambda: answer("static"),
            "answer_text_only": lambda: text_only(N_NEW),
            "compress": lambda: compressed.encode(pictures),
            "encode_uncompressed": lambda: plain.encode(pictures),
        },
        options.repeats,
    )
    bytes_kept = {"compressed": cells[0].nbytes, "uncompressed": cost(plain, pictures[0], question, 1, 1)["cache_bytes"]}
    result = {
        "model": options.model,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "milliseconds": {name: round(value, 3) for name, value in times.items()},
        "cache_bytes_per_picture": bytes_kept,
        "ratios": {
            "first_token_from_cache_vs_text_only": round(times["from_cache"] / times["text_only"], 3),
            "first_token_uncompressed_vs_from_cache": round(times["uncompressed"] / times["from_cache"], 3),
            "answer_from_cache_vs_text_only": round(times["answer_dynamic"] / times["answer_text_only"], 3),
            "answer_static_vs_dynamic": round(times["answer_static"] / times["answer_dynamic"], 3),
            "cache_bytes_vs_uncompressed": bytes_kept["compressed"] / bytes_kept["uncompressed"],
        },
        **provenance(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["milliseconds"] | result["ratios"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
