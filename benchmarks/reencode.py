"""Evaluating from the cache against encoding the picture again for every question, on easy-vqa; the ratio from one run.

    python benchmarks/reencode.py [--model tiny] [--images 50] [--batch-size 32] [--output study/results/reencode/cpu.json]

Both ways answer the same questions of the test split in the same batches and must give the same answers. `from_cache` is what
`htc-vlm eval` does: a picture is loaded and compressed once in a batch and shared by its questions. `reencoded` loads and
compresses the picture of every question. `asking_alone` is what is left when the cells were stored before. The two ways take
turns within each batch, so that a busy machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from htc_vlm import load
from htc_vlm.eval.run import Ask, batches, write_json
from htc_vlm.eval.run_info import provenance
from htc_vlm.eval.task import Item, make_task
from htc_vlm.model.answering import Answerer


@dataclass(frozen=True)
class Timed:
    """One batch one way."""

    answers: list[str]
    encode_s: float
    ask_s: float
    n_encoded: int


def timed(answerer: Answerer, asks: Sequence[Ask], max_new_tokens: int) -> Timed:
    """Encode every picture of `asks` once, then ask; the pictures' loading counts as encoding."""
    which = [i for i, ask in enumerate(asks) for _ in ask.questions]
    questions = [question for ask in asks for question in ask.questions]
    start = time.perf_counter()
    encoded = answerer.encode([ask.load_image() for ask in asks])
    _wait(answerer)
    middle = time.perf_counter()
    answers = answerer.ask(encoded, which, questions, max_new_tokens)
    _wait(answerer)
    return Timed(answers, middle - start, time.perf_counter() - middle, len(asks))


def _wait(answerer: Answerer) -> None:
    """A GPU works on after Python has gone on."""
    if answerer.model.device.type == "cuda":
        torch.cuda.synchronize(answerer.model.device)


def compare(answerer: Answerer, items: Sequence[Item], batch_size: int, max_new_tokens: int) -> dict[str, list[Timed]]:
    """{"from_cache": ..., "reencoded": ...}, a Timed per batch; the first batch is run once before and not counted."""
    out: dict[str, list[Timed]] = {"from_cache": [], "reencoded": []}
    for number, batch in enumerate(batches(items, batch_size)):
        shared = [Ask(group[0].image, group[0].load, [item.prompt for item in group]) for group in batch]
        single = [Ask(item.image, item.load, [item.prompt]) for group in batch for item in group]
        ways = [("from_cache", shared), ("reencoded", single)]
        if number == 0:
            timed(answerer, shared, max_new_tokens)
            timed(answerer, single, max_new_tokens)
        for way, asks in ways if number % 2 else ways[::-1]:
            out[way].append(timed(answerer, asks, max_new_tokens))
        if out["from_cache"][-1].answers != out["reencoded"][-1].answers:
            raise ValueError(f"batch {number} is answered differently from the cache: the times are of different work")
    return out


def summary(found: dict[str, list[Timed]]) -> dict[str, object]:
    """Seconds and ratios over all batches."""
    rows = {
        way: {
            "encode_s": sum(one.encode_s for one in parts),
            "ask_s": sum(one.ask_s for one in parts),
            "pictures_encoded": sum(one.n_encoded for one in parts),
        }
        for way, parts in found.items()
    }
    total = {way: row["encode_s"] + row["ask_s"] for way, row in rows.items()}
    return {
        "seconds": {way: {name: round(value, 3) for name, value in row.items()} for way, row in rows.items()},
        "ratios": {
            "reencoded_vs_from_cache": round(total["reencoded"] / total["from_cache"], 2),
            "reencoded_vs_asking_alone": round(total["reencoded"] / rows["from_cache"]["ask_s"], 2),
        },
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--images", type=int, default=50, help="pictures of the test split, the first ones")
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--data", type=Path, help="folder with easy-vqa (default: $HTC_VLM_DATA or data)")
    arguments.add_argument("--output", type=Path, default=Path("study/results/reencode/cpu.json"))
    options = arguments.parse_args()
    if options.data is not None:
        os.environ["HTC_VLM_DATA"] = str(options.data)

    task = make_task("easy-vqa")
    items = task.load(Path(os.environ.get("HTC_VLM_DATA", "data")), "test")
    pictures = list(dict.fromkeys(item.image for item in items))[: options.images]
    chosen = [item for item in items if item.image in set(pictures)]
    model, processor = load(options.model)
    answerer = Answerer(model.to(options.device), processor)
    found = compare(answerer, chosen, options.batch_size, task.max_new_tokens)
    result = {
        "model": options.model, "recipe": model.recipe().digest, "task": "easy-vqa", "n_images": len(pictures),
        "n_questions": len(chosen), "questions_per_image": round(len(chosen) / len(pictures), 2),
        "batch_size": options.batch_size, "device": options.device, "threads": torch.get_num_threads(),
        **summary(found), **provenance(),
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    print(json.dumps({name: result[name] for name in ("n_images", "n_questions", "seconds", "ratios")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
