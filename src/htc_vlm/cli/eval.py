"""`htc-vlm eval MODEL --task a,b`: answer the questions of benchmarks and score them.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from htc_vlm.cli._method import check_budget, method_of, parse_method, stock_method
from htc_vlm.eval.run import check_pictures, check_single_process, load_items, run_task, task_folder
from htc_vlm.eval.task import Item, Task, find_tasks, make_task
from htc_vlm.settings import budget, override, pair


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="htc-vlm eval", description=run.__doc__)
    parser.add_argument("model", help="a shipped checkpoint's name or a path")
    parser.add_argument("--compressor", metavar="NAME", help="another method for these weights (or JSON with settings)")
    parser.add_argument(
        "--method", metavar="NAME", help="applied to the uncompressed model, e.g. fastv with --budget (or JSON with settings)"
    )
    parser.add_argument("--budget", type=budget,
                        help="with --method: tokens (mean over layers) or a share such as 0.11")  # fmt: skip
    parser.add_argument("--task", required=True, help=f"one or more, by commas: {', '.join(find_tasks().names())}")
    parser.add_argument("--data", type=Path, help="folder with the official files (default: $HTC_VLM_DATA or data)")
    parser.add_argument("--output", type=Path, default=Path("runs/eval"), help="where answers and results go")
    parser.add_argument("--split", help="a split of the task; its first one by default")
    parser.add_argument("--limit", type=int, help="only the first N questions of the fixed order")
    parser.add_argument("--batch-size", type=int, default=32, help="questions asked at once")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--seed", type=int, help="recorded in the result; decoding is greedy")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.OPTION=VALUE", help="a protocol choice")
    return parser


def _tasks(args: argparse.Namespace) -> list[Task]:
    names = [name.strip() for name in args.task.split(",") if name.strip()]
    options: dict[str, dict[str, Any]] = {}
    example = "pope.headline=accuracy"
    for text in args.set:
        parts, value = pair(text, example)
        if len(parts) < 2:
            raise ValueError(f"--set takes TASK.OPTION=VALUE, got {parts[0]}={value}")
        key = ".".join(parts)
        name = max((name for name in names if key.startswith(f"{name}.")), key=len, default=None)  # a name may have dots
        if name is None:
            raise ValueError(f"--set names {parts[0]}, which --task does not run")
        override(options.setdefault(name, {}), text.strip().removeprefix(f"{name}."), example)
    return [make_task(name, options.get(name)) for name in names]


def _loaded(tasks: list[Task], args: argparse.Namespace, root: Path) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """Each task's questions, and why others are refused: files and pictures are looked for before a model is loaded."""
    items, refused = {}, {}
    for task in tasks:
        try:
            found = load_items(task, root, args.split)
            if not (task_folder(task, args.output, args.split) / "answers.jsonl").exists():
                check_pictures(found[: args.limit])
            items[task.name] = found
        except (ValueError, OSError) as error:
            refused[task.name] = str(error)
    return items, refused


def run(argv: list[str]) -> int:
    """Answer benchmark questions and score them; start again to go on where a run was cut off."""
    args = _parser().parse_args(argv)
    check_budget(args.method, args.budget)
    for name in ("limit", "batch_size"):
        given = getattr(args, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}; give at least 1")
    if args.data is not None:
        os.environ["HTC_VLM_DATA"] = str(args.data)  # where our own sets look for their files
    root = Path(os.environ.get("HTC_VLM_DATA", "data"))
    check_single_process()
    tasks = _tasks(args)  # before the model: a misspelt task should not cost a minute
    items, refused = _loaded(tasks, args, root)
    if not items:
        raise ValueError("; ".join(refused.values()) or "--task names no task")

    from htc_vlm import apply, load
    from htc_vlm.model.answering import Answerer
    from htc_vlm.model.loading import to_device
    from htc_vlm.model.recipe import recipe_of
    from htc_vlm.model.stock_answering import StockAnswerer, is_stock

    model, processor = load(args.model, compressor=parse_method(args.compressor))
    if is_stock(model):
        method = stock_method(args.method, args.budget)
        recipe = recipe_of(model, getattr(processor, "image_processor", None)).digest
        config = {"model": args.model, "compressor": {"name": "none"}, "recipe": recipe}
    else:
        method = method_of(args.method, args.budget, model)
        config = {"model": args.model, "compressor": model.config.compressor, "recipe": model.recipe().digest}
    to_device(model, args.device).eval()
    with nullcontext() if method is None or is_stock(model) else apply(model, **method) as applied:
        keep_pixels = applied is not None and applied.method.acts_in_tower
        answerer: Any = (
            StockAnswerer(model, processor, method) if is_stock(model) else Answerer(model, processor, keep_pixels=keep_pixels)
        )
        for task in (task for task in tasks if task.name in items):
            try:
                result = run_task(
                    answerer, task, args.output, args.limit, args.batch_size, root=root, split=args.split, seed=args.seed,
                    device=args.device, config=config if method is None else {**config, "method": method},
                    items=items.pop(task.name),
                )  # fmt: skip
                print(json.dumps(_shown(result)))
            except (ValueError, OSError) as error:
                refused[task.name] = str(error)
    if len(refused) == len(tasks):
        raise ValueError("; ".join(refused.values()))
    for name, why in refused.items():
        print(f"htc-vlm eval: {name}: {' '.join(why.split())}", file=sys.stderr)
    return 1 if refused else 0


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    """What is printed of a result: its metrics, and beside its score what answering blind scores."""
    shown = {key: result[key] for key in ("task", "split", "n_questions")}
    shown["metrics"] = {name: round(value, 2) for name, value in result["metrics"].items()}
    shown["blind"] = {name: round(metrics["score"], 2) for name, metrics in result["baselines"].items()}
    return shown
