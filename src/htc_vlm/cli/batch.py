"""htc-vlm batch: ask many questions about many pictures, each compressed once. Started again, it goes on where it stopped."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from htc_vlm.cli._method import add_method, kept_method
from htc_vlm.cli._toys import tell_toy

EXIT_PARTLY = 1


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="htc-vlm batch",
        description=__doc__,
        epilog="Exit code 0: done; 1: some pictures could not be read, their rows say why; 2: refused; 130: stopped.",
    )
    arguments.add_argument(
        "source", help="a folder, a pattern, a list (.txt, a path a line), parquet files or WebDataset tars"
    )
    arguments.add_argument("--store", required=True, metavar="DIR", help="where compressed pictures are kept")
    arguments.add_argument(
        "--questions", type=Path, required=True, metavar="FILE",
        help=".txt: a question a line, about all pictures; .jsonl, .csv, .parquet: rows of picture and question",
    )  # fmt: skip
    arguments.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the answers go")
    arguments.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    arguments.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the answers (default: jsonl)")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    arguments.add_argument("--dtype", default="model", choices=("model", "int8", "int4", "int2"), help="of a new store")
    add_method(arguments)
    arguments.add_argument("--maps", action="store_true", help="keep where the bottleneck looked, a byte a patch")
    arguments.add_argument("--max-new-tokens", type=int, default=16)
    arguments.add_argument("--batch-size", type=int, default=32, help="pictures a batch, and a commit (default: 32)")
    arguments.add_argument("--workers", type=int, help="processes that read and decode (local; default: CPUs - 1, at most 4)")
    arguments.add_argument("--actors", type=int, default=2, help="processes with a model (ray; default: 2)")
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "actors"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers is {options.workers}; give 0 (none beside this process) or more")
    from htc_vlm.batch import questions
    from htc_vlm.batch.run import run as run_batch
    from htc_vlm.batch.steps import Settings

    if options.format == "parquet":  # told before the work
        from htc_vlm.store.export import pyarrow

        pyarrow()
    settings = Settings(
        options.model, options.store, options.dtype, options.maps, options.max_new_tokens, options.device, kept_method(options)
    )
    asked = questions.read(options.questions)
    tell_toy("batch", options.model)
    try:
        report = run_batch(
            options.source, asked, options.output, settings, _engine(options), options.batch_size, options.format,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    except KeyboardInterrupt:
        print("htc-vlm batch: stopped; start it again in the same way to go on", file=sys.stderr)
        return 130
    for reason in report.reasons:
        print(f"htc-vlm batch: left out: {reason}", file=sys.stderr)
    if report.refused > len(report.reasons):
        print(f"htc-vlm batch: left out: {report.refused - len(report.reasons)} more; see the column `error`", file=sys.stderr)
    print(json.dumps(asdict(report), indent=1))
    return EXIT_PARTLY if report.refused else 0


def _engine(options: argparse.Namespace) -> Any:
    if options.engine == "ray":
        from htc_vlm.batch import on_ray

        return functools.partial(on_ray.engine, n_actors=options.actors)
    from htc_vlm.batch import local

    n_workers = min(4, (os.cpu_count() or 1) - 1) if options.workers is None else options.workers
    return functools.partial(local.engine, n_workers=n_workers)
