"""htc-vlm compress: turn pictures into a file of compressed images that questions can be asked of later."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm compress", description=__doc__)
    arguments.add_argument("pictures", nargs="+", type=Path, help="picture files; a folder stands for the files in it")
    arguments.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the compressed pictures go")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--force", action="store_true", help="replace a file that htc-vlm did not write")
    return arguments


def files_of(paths: list[Path]) -> list[Path]:
    """Folders replaced by what is in them, sorted; folders inside stay, and are named as left out when they are read."""
    return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    from htc_vlm import CompressedImages, load
    from htc_vlm.data.images import ImageError, load_for_model
    from htc_vlm.files import check_output
    from htc_vlm.model.answering import Answerer

    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; give at least 1")
    files = files_of(options.pictures)
    check_output(options.output, options.force, files)

    model, processor = load(options.model)
    if not model.model.compressor.n_bottleneck:
        raise ValueError(f"model {options.model!r} has no bottleneck, so it keeps no compressed pictures")
    answerer = Answerer(model, processor)
    names: list[str] = []
    parts: list[CompressedImages] = []
    batch: list[Any] = []
    n_refused = 0
    for file in files:
        try:
            batch.append(load_for_model(file))
            names.append(str(file))
        except (ImageError, OSError) as error:
            n_refused += 1
            print(f"htc-vlm compress: left out: {' '.join(str(error).split())}", file=sys.stderr)
        if len(batch) == options.batch_size:
            parts.append(answerer.encode(batch))  # type: ignore[arg-type]
            batch = []
    if batch:
        parts.append(answerer.encode(batch))  # type: ignore[arg-type]
    if not parts:
        raise ValueError("no picture could be read, so there is nothing to write")
    images = CompressedImages.concat(parts)
    images.save(options.output)
    report = {"output": str(options.output), "pictures": names, "refused": n_refused, "bytes_per_picture": images[0].nbytes}
    print(json.dumps(report, indent=1))
    return 2 if n_refused else 0
