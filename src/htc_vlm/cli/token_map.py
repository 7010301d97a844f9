"""`htc-vlm token-map PICTURE --method fastv --budget 12 --output OUT.png`: which patch went into which token.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from htc_vlm.files import MAX_PIXELS, pixel_limit, positive
from htc_vlm.settings import budget, from_pairs

QUESTION = "what is at the top left ?"


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm token-map", description="Draw which patch went into which token.")
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("--method", required=True, help="one that needs no training, e.g. tome, fastv, sparse_vlm")
    arguments.add_argument("--budget", type=budget, help="visual tokens, mean over layers, or a share; sets the settings")
    arguments.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, e.g. n_keep=12")
    arguments.add_argument("--question", default=QUESTION, help=f"what is asked (default: {QUESTION!r})")
    arguments.add_argument("--output", type=Path, required=True, metavar="OUT.png")
    arguments.add_argument("--model", default="tiny-upper", help="an uncompressed checkpoint (default: tiny-upper)")
    arguments.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    arguments.add_argument("--force", action="store_true", help="replace a file that htc-vlm did not write")
    return arguments


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    from htc_vlm.files import FIGURES, check_output

    check_output(options.output, options.force, [options.picture], FIGURES)
    from htc_vlm import compressors, load
    from htc_vlm.data.images import load_for_model
    from htc_vlm.model.loading import to_device
    from htc_vlm.model.modeling import check_llava, sizes_of
    from htc_vlm.viz import token_map
    from htc_vlm.viz.seen import seen_by_model

    picture = load_for_model(options.picture, **pixel_limit(options))
    model, processor = load(options.model)
    check_llava(model, "a map of tokens")
    to_device(model, options.device)
    n_layers = model.config.text_config.num_hidden_layers
    settings: dict[str, Any] = from_pairs(options.set, "n_keep=12")
    if options.budget is not None:
        n_patches = sizes_of(model.config).n_patches
        settings = compressors.at_budget(options.method, options.budget, n_patches, n_layers, settings)
    found = token_map.record(model, processor, picture, options.question, options.method, settings)
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    square = seen_by_model(model, processor, picture)
    token_map.draw(square, found, f"{options.method}({shown})", options.output)
    print("\n".join([*(stage.title for stage in found), str(options.output)]))
    return 0
