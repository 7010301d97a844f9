"""`htc-vlm cost [MODEL] --budget 64`: what each method costs at a budget, all counted the same way (applied/cost_table.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from htc_vlm import settings
from htc_vlm.files import read_object

LLAVA_7B = "llava-1.5-7b"


@dataclass(frozen=True)
class Model:
    """P of the picture, the decoder, and why a method does not act on it (None: it does)."""

    n_patches: int
    decoder: Any
    refusal: Callable[[Any], str | None]


def picture_size(text: str) -> tuple[int, int]:
    """"640x480" -> (height, width).

    >>> picture_size("640x480")
    (480, 640)
    """
    width, times, height = text.partition("x")
    if not (times and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--picture is {text!r}; give its width and height in pixels, e.g. 640x480")
    return int(height), int(width)


def find_model(model: str, picture: tuple[int, int]) -> Model:
    """A public model by name (without any file), else a shipped checkpoint or a folder."""
    from htc_vlm.applied.true_shapes import SHAPES
    from htc_vlm.ops import cost

    if model in SHAPES:
        shape = SHAPES[model]
        n_patches = shape.visual_tokens(*picture)
        return Model(n_patches, shape.decoder, lambda method: shape.refusal(method, n_patches))
    from htc_vlm.applied import hf_compat
    from htc_vlm.convert import llava_original
    from htc_vlm.model.configuration import HtcVlmConfig
    from htc_vlm.model.loading import find

    folder = find(model)
    if llava_original.is_original_layout(folder):
        options = llava_original.options_of(folder)
        n_patches, text_config = options["image_seq_length"], options["text_config"]
    elif is_family(folder):
        raise ValueError(
            f"{folder}: how many tokens a picture has in this family depends on the picture; give a public name, with "
            f"--picture: {', '.join(SHAPES)}"
        )
    elif "text_config" in read_object(folder / "config.json"):
        config = HtcVlmConfig.from_pretrained(folder)
        n_patches, text_config = hf_compat.n_patches(config), config.text_config
    else:
        raise ValueError(f"{folder}: its config.json has no text_config, so it is no LLaVA, nor an original LLaVA-1.5")
    return Model(n_patches, cost.DecoderShape.from_config(text_config), lambda method: None)


def is_family(folder: Path) -> bool:
    """Is it a checkpoint of a known family other than LLaVA?"""
    from htc_vlm.applied.families import Family, Llava, family_class
    from htc_vlm.model.loading import model_type

    return family_class(model_type(folder)) not in (Family, Llava)


def default_budget(n_patches: int) -> int:
    """64 tokens, the paper's smallest; where an image has fewer patches than LLaVA-1.5's 576, the same share of them.

    >>> default_budget(576), default_budget(2880), default_budget(36)
    (64, 64, 4)
    """
    return min(64, max(1, round(n_patches * 64 / 576)))


def run(argv: list[str]) -> int:
    """Print tokens per layer, FLOPs of the language model and bytes of its cache, for every method at one budget."""
    parser = argparse.ArgumentParser(prog="htc-vlm cost", description=run.__doc__)
    parser.add_argument(
        "model", nargs="?", default=LLAVA_7B,
        help=f"{LLAVA_7B} (the default), llava-1.6-vicuna-7b, llava-onevision-qwen2-7b, internvl3-8b, smolvlm-2.2b, "
        "qwen2.5-vl-7b, qwen3-vl-8b, or a shipped checkpoint's name or a path",
    )  # fmt: skip
    parser.add_argument("--budget", type=settings.budget,
                        help="visual tokens per image (mean over layers), or a share of the patches such as 0.11 "
                             "(default: 64 of 576, and the same share of fewer)")  # fmt: skip
    parser.add_argument("--picture", default="640x480", metavar="WIDTHxHEIGHT", help="its size counts (default: 640x480)")
    parser.add_argument("--text", type=int, default=40, help="tokens of the question and its template")
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    args = parser.parse_args(argv)
    from htc_vlm.applied import cost_table
    from htc_vlm.compressors import budget_tokens

    model = find_model(args.model, picture_size(args.picture))
    if args.text < 1:
        raise ValueError(f"--text is {args.text}; give at least 1")
    budget = default_budget(model.n_patches) if args.budget is None else args.budget
    budget_tokens("--budget", budget, model.n_patches)
    table, missing = cost_table.rows(budget, model.n_patches, model.decoder, args.text, model.refusal)
    if args.format == "json":
        report = {"picture": args.picture, "visual_tokens": model.n_patches, "rows": [asdict(row) for row in table]}
        print(json.dumps(report | {"missing": missing}, indent=1))
        return 0
    print(f"{args.model}, a picture of {args.picture} pixels: {model.n_patches} visual tokens\n")
    print(cost_table.to_markdown(table), end="")
    for name, why in missing.items():
        print(f"\nnot at this budget: {name} ({why})")
    return 0
