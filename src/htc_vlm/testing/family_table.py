"""Writes docs/families.md: which method works on which family, tried on tiny models; refusals in their own words.

Source:  htc_vlm.apply on the models of `testing.families`. `python -m htc_vlm.testing.family_table docs/families.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from htc_vlm.applied.apply import apply
from htc_vlm.compressors import COMPRESSORS, AppliedOnly, Compressor
from htc_vlm.model.bottlenecks import STOCK
from htc_vlm.testing import tiny_llava
from htc_vlm.testing.families import (
    FAMILIES,
    N_LAYERS,
    Inputs,
    bottleneck_inputs,
    n_tokens,
    tiny_bottleneck,
    tiny_model,
)

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
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "voco": {}, "htc": {"quantizer": COMPRESSORS.get("htc")._TINY}, "readers": {"n_readers": 2},  # type: ignore[attr-defined]
}  # fmt: skip
TITLES = {
    "llava": "LLaVA", "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision", "internvl": "InternVL",
    "smolvlm": "SmolVLM, Idefics3", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
}  # fmt: skip
HEAD = """# Methods and families

After this page you know which method runs on which family of vision-language models, and why others do not. Each "works" is
tried on a tiny random model of that family when `make table` makes this page; `tests/applied/test_families.py` holds what
must be true of it: keeping all tokens is the stock model bit for bit, cached is recomputed, a ragged left-padded batch is its
rows. A number is a refusal, told below.

"""
NOTES = """
What counts as an image: all tiles of a picture, with their newlines, in LLaVA-NeXT and LLaVA-OneVision; all its tiles in
InternVL, SmolVLM and Idefics3 (where `avg_pool` takes pictures of one tile); a picture at its own size in Qwen-VL. Where
pictures differ in size, give a share: `budget=0.11`.

Methods before the language model see the tokens that the decoder was to get; in LLaVA also the vision tower's features.
With one axis of positions what is left is numbered anew; with M-RoPE (Qwen-VL) each token keeps its place in the picture,
and one made of several takes the place of the first. Qwen3-VL's deep features leave with their tokens.

A model of no family above gets the defaults, if it answers to `get_decoder`, `config.image_token_id` and
`get_image_features`. `qformer` and `llava_mini` have weights of their own and need a LLaVA that was trained with them.

## A bottleneck in another family

`voco`, `htc` and `readers` become part of a model, which then must be trained:

```bash
htc-vlm convert Qwen2.5-VL-7B-Instruct --compressor voco --output qwen-voco
```

The folder loads with `htc_vlm.load`, or after `import htc_vlm` with transformers' Auto classes. It is the family's own model
and processor; the processor writes a picture as its visual placeholders and its bottleneck tokens. `model.compress`,
`model.generate(compressed=...)`, `htc_vlm.compress`, `htc_vlm.generate`, the store and the commands are those of our LLaVA.
On a tiny random model:

```python
from htc_vlm.testing.families import bottleneck_inputs, tiny_bottleneck

model = tiny_bottleneck("qwen2_5_vl", {"name": "voco"})
pictures = bottleneck_inputs("qwen2_5_vl", model, [[0], [1], [2]])  # 16, 8 and 24 visual tokens
kept = model.compress(**pictures)
print(kept.n_bottleneck, "entry a layer; positions that each picture takes:", kept.n_visual)
questions = bottleneck_inputs("qwen2_5_vl", model, [[0], [1], [2]], is_compressed=True)
print(model.generate(**questions, compressed=kept, max_new_tokens=2, do_sample=False).shape)
assert kept.n_visual == (4, 4, 6)
```

One masked pass trains it, and equals compressing and then reading text over the entries (`tests/model/test_bottlenecks.py`).
Pictures of one size are compressed together, others one after the other, so nothing is padded. All tiles of a picture are
one image; marks that SmolVLM and Idefics3 write between tiles are left out, so the language model does not read them. `htc`
makes its anchors from the whole picture: the overview tile, or in Qwen-VL the picture itself. With M-RoPE the bottleneck has
equal positions on all axes, and one rotation moves it. What Qwen3-VL adds to its visual tokens behind its first layers is added
in the compress pass too; anchors get none of it. The fast prefill runs on Llama, Mistral, Qwen2, Qwen3 and Qwen-VL decoders
where `visual_attention` is `self`; decoders whose keys no rotation moves are refused at load, by name. Refused, too: videos,
maps of where the bottleneck looked and `channels: discrete`. Beams, a static cache, bfloat16 and activation checkpointing are
tested on each family.
"""


def applied_methods() -> dict[str, tuple[str, dict[str, Any]]]:
    """METHODS, and every other registered method that needs no weights, with the last of its EXAMPLES."""
    known = {name for name, _ in METHODS.values()} | set(bottlenecks()) | {"none"}
    others = {name: COMPRESSORS.get(name) for name in COMPRESSORS.own_names() if name not in known}
    without_weights = (Compressor.setup, AppliedOnly.setup)
    return METHODS | {name: (name, dict(cls.EXAMPLES[-1])) for name, cls in others.items() if cls.setup in without_weights}


def bottlenecks() -> dict[str, dict[str, Any]]:
    """BOTTLENECKS, and every other registered method with bottleneck tokens, with the last of its EXAMPLES."""
    others = {name: COMPRESSORS.get(name) for name in COMPRESSORS.own_names() if name not in BOTTLENECKS}
    examples = {name: (cls, dict(cls.EXAMPLES[-1])) for name, cls in others.items() if cls.EXAMPLES}
    return BOTTLENECKS | {
        name: settings for name, (cls, settings) in examples.items() if cls(cls.Settings(**settings)).n_bottleneck
    }


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


def tried_bottleneck(family: str, name: str, settings: dict[str, Any]) -> str | None:
    """Why no bottleneck can be put into the family; None where one compresses a picture into as many entries as it promises."""
    if family not in ("llava", *STOCK):
        return "cannot be put into such a model: how its pictures stand in prompts is not known here"
    options = {"name": name, **settings}
    model = tiny_llava.build(options) if family == "llava" else tiny_bottleneck(family, options)
    pixels: dict[str, Any] = {"pixel_values": tiny_llava.pixels(1)}
    if family != "llava":
        pixels = bottleneck_inputs(family, model, [[0]])
    kept = model.compress(**pixels)
    if kept.n_bottleneck != model.model.compressor.n_bottleneck or not torch.isfinite(kept.kv).all():
        raise AssertionError(f"{name} in {type(model).__name__} compressed a picture into {kept!r}")
    return None


def short(reason: str, model: Any) -> str:
    """A refusal without the names of method and model and without what to use instead, which others share."""
    said = reason.split("; use ")[0].split(" ", 1)[1]
    return said.replace(f"in {type(model).__name__} ", "here ").replace(type(model).__name__, "this model")


def page() -> str:
    """The whole page, in Markdown."""
    made = {family: tiny_model(family) for family in FAMILIES}
    found = [
        (row, [None if (said := tried(*one, name, settings)) is None else short(said, one[0]) for one in made.values()])
        for row, (name, settings) in applied_methods().items()
    ]
    found += [
        (f"{name}, put in and trained", [tried_bottleneck(family, name, settings) for family in FAMILIES])
        for name, settings in bottlenecks().items()
    ]
    reasons = list(dict.fromkeys(said for _, row in found for said in row if said is not None))
    lines = ["| | " + " | ".join(TITLES[family] for family in FAMILIES) + " |", "|---|" + "---|" * len(FAMILIES)]
    for title, row in found:
        cells = ["works" if said is None else f"[{reasons.index(said) + 1}]" for said in row]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    told = [f"{i}. The method {reason}." for i, reason in enumerate(reasons, start=1)]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(told) + "\n" + NOTES


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
