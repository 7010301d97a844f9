"""htc-vlm heatmap: draw what the bottleneck token looked at in each picture."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm heatmap", description=__doc__)
    arguments.add_argument("pictures", nargs="+", type=Path)
    arguments.add_argument("--output", type=Path, required=True, metavar="OUT.png")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    from htc_vlm import load
    from htc_vlm.analysis import heatmap
    from htc_vlm.data.images import load_for_model

    pictures = [load_for_model(path) for path in options.pictures]
    model, processor = load(options.model)
    heatmap.draw(model, processor, pictures, [path.name for path in options.pictures], options.output)
    print(options.output)
    return 0
