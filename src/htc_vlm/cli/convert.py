"""`htc-vlm convert MODEL --compressor htc --mgvq FILE --output DIR`: a checkpoint with a compressor, ready to train.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from htc_vlm.settings import from_pairs


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm convert", description=run.__doc__)
    told = "folder of a Hugging Face LLaVA, an original LLaVA-1.5, another family (docs/families.md), or ours"
    arguments.add_argument("llava", type=Path, metavar="MODEL", help=told)
    arguments.add_argument("--compressor", default="htc", help="name of the method (default: htc)")
    arguments.add_argument("--mgvq", type=Path, help="weights of the quantizer: an official file, or our folder")
    arguments.add_argument("--vision", type=Path, help="CLIP folder, for original checkpoints without a vision tower")
    arguments.add_argument("--output", type=Path, required=True, help="new folder")
    arguments.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="compressor.KEY=VALUE", help="a setting of the method"
    )
    return arguments


def compressor_options(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """A method's name and `compressor.KEY=VALUE` texts -> its options.

    >>> compressor_options("htc", ["compressor.n_anchors=8", "compressor.quantizer.preset=f16c32g8"])
    {'name': 'htc', 'n_anchors': 8, 'quantizer': {'preset': 'f16c32g8'}}
    """
    given = from_pairs(settings, "compressor.n_anchors=8")
    if not isinstance(given.get("compressor", {}), dict) or set(given) - {"compressor"}:
        raise ValueError(f"--set {' '.join(settings)!r}: write compressor.KEY=VALUE, e.g. compressor.n_anchors=8")
    return {"name": name, **given.get("compressor", {})}


def run(argv: list[str]) -> int:
    """Put a compressor into a LLaVA checkpoint, or a bottleneck into one of another family, and save it with its processor."""
    args = parser().parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"{args.output}: already there; give a new folder")
    options = compressor_options(args.compressor, args.set)
    import torch

    from htc_vlm.files import replacing_folder
    from htc_vlm.model.add_compressor import with_compressor

    dtype = args.dtype if args.dtype == "auto" else vars(torch).get(args.dtype)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {args.dtype!r}: write auto or a torch dtype such as float32 or bfloat16")
    model, processor = with_compressor(args.llava, options, args.mgvq, dtype, vision=args.vision)
    with replacing_folder(args.output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    compressor = model.model.compressor
    report = {
        "output": str(args.output),
        "compressor": model.config.compressor,
        "visual_tokens": getattr(processor, "n_visual", None),  # None: they differ between pictures
        "cached_tokens": compressor.n_bottleneck or processor.n_visual,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "of_compressor": sum(weight.numel() for weight in compressor.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(report, indent=1))
    return 0
