"""Writes docs/families.md: which method works on which family, tried on tiny models; refusals in their own words.

Source:  htc_vlm.apply on the models of `testing.families`. `python -m htc_vlm.testing.family_table docs/families.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from htc_vlm.applied.apply import apply
from htc_vlm.testing.families import FAMILIES, N_LAYERS, Inputs, n_tokens, tiny_model

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> method and settings for tiny models
    "random_drop": ("random_drop", {"n_keep": 3}),
    "divprune": ("divprune", {"n_keep": 3}),
    "tome, after the tower": ("tome", {"n_keep": 4, "place": "after_tower", "metric": "features"}),
    "tome, in the tower": ("tome", {"n_keep": 4}),
    "visionzip": ("visionzip", {"n_dominant": 3, "n_contextual": 2}),
    "avg_pool": ("avg_pool", {"n_tokens": 4}),
    "downsample": ("downsample", {"n_tokens": 4}),
    "fastv": ("fastv", {"n_keep": 3, "layer": 1}),
    "pyramid_drop": ("pyramid_drop", {"stages": (1, 3), "ratio": 0.5}),
    "sparse_vlm": ("sparse_vlm", {"layers": (0, 1), "keep": (6, 3)}),
    "sparse_vlm, plus": ("sparse_vlm", {"layers": (0, 1), "keep": (6, 3), "plus": True, "n_heads": 2}),
}
TITLES = {
    "llava": "LLaVA", "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision", "internvl": "InternVL",
    "smolvlm": "SmolVLM, Idefics3", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
}  # fmt: skip
HEAD = """# Methods and families

Which method `htc_vlm.apply` runs on which family of vision-language models. Each "works" is tried on a tiny random
model of that family when this page is made; `tests/applied/test_families.py` holds what must be true of it (keeping all
tokens is the stock model bit for bit, cached is recomputed, a ragged left-padded batch is its rows). A number is a
refusal, told below. This page is made by `python -m htc_vlm.testing.family_table docs/families.md`; a test compares it.

"""
NOTES = """
What counts as an image: all tiles of a picture, with their newlines, in LLaVA-NeXT and LLaVA-OneVision; all its tiles in
InternVL, SmolVLM and Idefics3 (where `avg_pool` takes pictures of one tile); a picture at its own size in Qwen-VL. Where
pictures differ in size, give a share: `budget=0.11`.

Methods before the language model see the tokens that the decoder was to get; in LLaVA also the vision tower's features.
With one axis of positions what is left is numbered anew; with M-RoPE (Qwen-VL) each token keeps its place in the picture,
and one made of several takes the place of the first. Qwen3-VL's deep features leave with their tokens.

A model of no family above gets the defaults, if it answers to `get_decoder`, `config.image_token_id` and
`get_image_features`. `qformer`, `llava_mini`, `voco` and `htc` have weights of their own and need a checkpoint.
"""


def tried(model: Any, inputs: Inputs, name: str, settings: dict[str, Any]) -> str | None:
    """Why the method does not act on the model; None where it does."""
    try:
        with torch.no_grad(), apply(model, name, **settings) as applied:
            model(**inputs)
    except ValueError as error:
        return str(error)
    schedule = applied.schedule
    if schedule is None or len(schedule) != N_LAYERS or min(schedule) >= n_tokens(inputs)[0]:
        raise AssertionError(f"{name} on {type(model).__name__} ran and took nothing away: {schedule}")
    return None


def short(reason: str, model: Any) -> str:
    """A refusal without the names of method and model and without what to use instead, which others share."""
    said = reason.split("; use ")[0].split(" ", 1)[1]
    return said.replace(f"in {type(model).__name__} ", "here ").replace(type(model).__name__, "this model")


def page() -> str:
    """The whole page, in Markdown."""
    made = {family: tiny_model(family) for family in FAMILIES}
    reasons: list[str] = []
    lines = ["| | " + " | ".join(TITLES[family] for family in FAMILIES) + " |", "|---|" + "---|" * len(FAMILIES)]
    for row, (name, settings) in METHODS.items():
        cells = []
        for model, inputs in made.values():
            reason = tried(model, inputs, name, settings)
            said = None if reason is None else short(reason, model)
            if said is not None and said not in reasons:
                reasons.append(said)
            cells.append("works" if said is None else f"[{reasons.index(said) + 1}]")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    told = [f"{i}. The method {reason}." for i, reason in enumerate(reasons, start=1)]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(told) + "\n" + NOTES


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
