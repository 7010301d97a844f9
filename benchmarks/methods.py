"""Prefill and decode time of every method against `none`, in one run, beside what the FLOPs promise.

    python benchmarks/methods.py [--shape cpu] [--budgets 192 128 64] [--repeats 3] [--output study/results/methods/cpu.json]
    python benchmarks/methods.py --shape 7b --device cuda --output study/results/methods/gpu-7b.json

Weights are random: what a token costs does not depend on them. The methods take turns within each repeat, so that a busy
machine disturbs them alike; medians. Counting the FLOPs, which runs each once, is the warm-up. Every call starts from
pixels and ends with the logits of the first token (prefill), then some steps with the cache (decode). `promised` is the
ratio of the language model's FLOPs by the schedule (htc_vlm.ops.cost), `counted` that of all FLOPs in the calls that were
timed, vision tower, compressor and scores included. The rate of one matrix product at each length says how much of the
rest is the machine's: short sequences keep it less busy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

import htc_vlm
from htc_vlm import compressors
from htc_vlm.applied import cost_table
from htc_vlm.compressors import COMPRESSORS, Compressor
from htc_vlm.eval.run_info import provenance
from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration
from htc_vlm.model.add_compressor import LLAVA_7B, base_config
from htc_vlm.model.modeling import sizes_of
from htc_vlm.ops import cost

IMAGE, BOTTLENECK = 998, 999  # placeholders in the CPU shape's vocabulary of 1,000


@dataclass(frozen=True)
class Shape:
    """A LLaVA to be made of random weights, and how the methods with weights of their own are sized beside it."""

    config: HtcVlmConfig
    dtype: torch.dtype
    own: dict[str, dict[str, Any]] = field(default_factory=dict)  # method -> settings beside those of a budget
    instead: dict[str, dict[str, Any]] = field(default_factory=dict)  # method -> settings in place of them


def cpu_shape() -> Shape:
    """576 patches of a narrow CLIP before 12 Llama layers of width 1024: the language model dominates."""
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=336, patch_size=14,
        projection_dim=256,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=4096,
    )  # fmt: skip
    config = HtcVlmConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, bottleneck_token_id=BOTTLENECK,
        tie_word_embeddings=False,
    )  # fmt: skip
    own = {"htc": {"quantizer": {"preset": "tiny", "image_size": 160}}, "qformer": {"width": 192, "n_layers": 6}}
    return Shape(config, torch.float32, own)


def shape_7b() -> Shape:
    """LLaVA-1.5-7B's."""
    return Shape(base_config(LLAVA_7B, {"name": "none"}), torch.bfloat16)


SHAPES = {"cpu": cpu_shape, "7b": shape_7b}


@dataclass(frozen=True)
class Contender:
    """A method with settings. model: with weights of its own where it has any; else it is applied for a while."""

    name: str
    settings: dict[str, Any]
    budget: int | None
    method: Compressor
    model: HtcVlmForConditionalGeneration
    is_applied: bool

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.settings])

    def active(self) -> AbstractContextManager[Any]:
        return htc_vlm.apply(self.model, self.name, **self.settings) if self.is_applied else nullcontext()


@dataclass
class Times:
    """Milliseconds of each turn; decode per token; again: the next question over the cells of the same image."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)


def new_model(shape: Shape, device: torch.device) -> HtcVlmForConditionalGeneration:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        model: Any = HtcVlmForConditionalGeneration._from_config(shape.config, dtype=shape.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def twin(model: HtcVlmForConditionalGeneration, compressor: dict[str, Any]) -> HtcVlmForConditionalGeneration:
    """The same weights, shared, with a compressor of its own beside them."""
    config = HtcVlmConfig.from_dict({**model.config.to_dict(), "compressor": compressor})
    with torch.device("meta"):
        made = HtcVlmForConditionalGeneration(config)
    method = compressors.build(**config.compressor)
    with model.device:
        method.setup(replace(sizes_of(config), new_decoder_layer=model.model._new_decoder_layer))
        method.apply(made._init_weights)
    made.model.vision_tower = model.model.vision_tower
    made.model.multi_modal_projector = model.model.multi_modal_projector
    made.model.language_model = model.model.language_model
    made.lm_head = model.lm_head
    made.model.compressor = method.to(model.device, model.dtype)
    return made.eval().requires_grad_(False)


def methods() -> list[tuple[str, dict[str, Any]]]:
    """Every registered method that reduces tokens, and its variants: name, and what is set besides a budget."""
    names = [name for name in compressors.names() if name != "none"]
    return [(name, besides) for name in names for besides in ({}, *compressors.get(name).VARIANTS)]


def contenders(shape: Shape, model: HtcVlmForConditionalGeneration, budgets: list[int]) -> list[Contender]:
    """`none`, then every method at every budget."""
    sizes, n_layers = sizes_of(shape.config), shape.config.text_config.num_hidden_layers
    found = [Contender("none", {}, None, compressors.build("none"), model, False)]
    for budget in budgets:
        for name, besides in methods():
            try:
                made = shape.instead.get(name) or compressors.get(name).for_budget(budget, sizes.n_patches, n_layers)
            except ValueError as error:
                print(f"left out: {name} at {budget} tokens ({error})", flush=True)
                continue
            settings = {**made, **shape.own.get(name, {}), **besides}
            method = compressors.build(name, **settings)
            has_weights = COMPRESSORS.get(name) not in applied_methods()
            own = twin(model, {"name": name, **settings}) if has_weights else model
            found.append(Contender(name, settings, budget, method, own, not has_weights))
    return found


def applied_methods() -> list[type]:
    """Methods without weights or bottleneck tokens."""
    without = (Compressor.setup, compressors.AppliedOnly.setup)
    classes: list[Any] = [COMPRESSORS.get(name) for name in compressors.names()]
    return [cls for cls in classes if cls.setup in without and cls.name not in ("none", "voco")]


def prompt(contender: Contender, n_text: int) -> Tensor:
    """(1, L): the image first, then n_text words."""
    config, method = contender.model.config, contender.method
    n_patches = sizes_of(config).n_patches
    n_visual = n_patches if contender.is_applied else method.n_visual(n_patches)
    words = [3 + i % 500 for i in range(n_text)]
    image = [config.image_token_id] * n_visual + [config.bottleneck_token_id] * method.n_bottleneck
    return torch.tensor([[*image, *words]], device=contender.model.device)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: seconds of all threads, on a machine others use


def timed(call: Callable[[], Any], device: torch.device, clock: str = "wall") -> tuple[float, Any]:
    """Milliseconds of a call, its work on the device done, and its result."""
    synchronise(device)
    start = CLOCKS[clock]()
    out = call()
    synchronise(device)
    return 1000 * (CLOCKS[clock]() - start), out


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_token(contender: Contender, ids: Tensor, pixels: Tensor) -> Any:
    """From pixels to the first token's logits; bottleneck methods compress first."""
    model = contender.model
    if contender.method.n_bottleneck:
        return over_cells(contender, ids, model.compress(pixel_values=pixels))
    return model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)


def over_cells(contender: Contender, ids: Tensor, cells: Any) -> Any:
    return contender.model(input_ids=ids, compressed=cells, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def run_once(contender: Contender, ids: Tensor, pixels: Tensor, n_new: int, times: Times, clock: str) -> None:
    """One prefill and n_new steps; for bottleneck methods also the next question."""
    model, device = contender.model, contender.model.device

    def taken(call: Callable[[], Any]) -> tuple[float, Any]:
        return timed(call, device, clock)

    with contender.active():
        prefill_ms, out = taken(lambda: first_token(contender, ids, pixels))
        cache, token = out.past_key_values, ids[:, -1:]
        steps = [
            taken(lambda: model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1))[0]
            for _ in range(n_new)
        ]
        again_ms = None
        if contender.method.n_bottleneck:
            cells = model.compress(pixel_values=pixels)
            again_ms, _ = taken(lambda: over_cells(contender, ids, cells))
    times.prefill.append(prefill_ms)
    times.decode.append(median(steps))
    if again_ms is not None:
        times.again.append(again_ms)


def count(contender: Contender, ids: Tensor, pixels: Tensor) -> int:
    """FLOPs of the prefill that is timed."""
    with contender.active():
        return cost.count_flops(lambda: first_token(contender, ids, pixels))


def row(contender: Contender, times: Times, flops: int, n_text: int, n_new: int, shape: cost.DecoderShape) -> dict[str, Any]:
    """What is known of one contender, before ratios."""
    n_patches = sizes_of(contender.model.config).n_patches
    promised = cost_table.row_of(contender.method, contender.settings, n_patches, shape, n_text)
    cached = contender.method.cached_tokens(n_patches, shape.n_layers)
    return {
        "method": contender.name,
        "settings": contender.settings,
        "budget": contender.budget,
        "schedule": promised.schedule,
        "equivalent_tokens": round(promised.equivalent_tokens, 2),
        "prefill_ms": round(median(times.prefill), 3),
        "decode_ms": round(median(times.decode), 3),
        "again_ms": round(median(times.again), 3) if times.again else None,
        "prefill_ms_all": [round(value, 2) for value in times.prefill],
        "promised_flops": round(promised.prefill_tflops * 1e12),
        "counted_flops": flops,
        "decode_flops": cost.decode_flops(shape, cached, n_text, n_new) // n_new,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row beside the first, which is `none`.

    >>> numbers = {"prefill_ms": 8.0, "decode_ms": 2.0, "promised_flops": 4, "counted_flops": 5, "decode_flops": 1}
    >>> half = {**numbers, "prefill_ms": 4.0, "promised_flops": 1}
    >>> {name: value for name, value in with_ratios([numbers, half])[1].items() if name.endswith("_ratio")}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'prefill_ratio': 0.5, 'decode_ratio': 1.0, 'promised_ratio': 0.25, 'counted_ratio': 1.0, 'decode_flops_ratio': 1.0}
    """
    base = rows[0]
    names = {
        "prefill_ratio": "prefill_ms", "decode_ratio": "decode_ms", "promised_ratio": "promised_flops",
        "counted_ratio": "counted_flops", "decode_flops_ratio": "decode_flops",
    }  # fmt: skip
    return [{**one, **{name: round(one[of] / base[of], 4) for name, of in names.items()}} for one in rows]


@torch.no_grad()
def matmul_rates(shape: cost.DecoderShape, lengths: list[int], dtype: torch.dtype, device: torch.device) -> dict[int, float]:
    """GFLOP/s of the MLP's matrix product for so many tokens; the best of ten."""
    weight = torch.randn(shape.mlp_width, shape.width, device=device).to(dtype)
    rates = {}
    for n in lengths:
        states = torch.randn(n, shape.width, device=device).to(dtype)
        best_ms = min(timed(lambda states=states: states @ weight.T, device)[0] for _ in range(10))
        rates[n] = round(2 * n * shape.width * shape.mlp_width / best_ms / 1e6, 1)
    return rates


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=sorted(SHAPES), default="cpu")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--budgets", type=int, nargs="+", default=[192, 128, 64])
    arguments.add_argument("--text", type=int, default=40, help="words of the question")
    arguments.add_argument("--new", type=int, default=4, help="decode steps")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: on a machine that others use")
    arguments.add_argument("--output", type=Path, default=Path("study/results/methods/cpu.json"))
    options = arguments.parse_args()
    device, shape = torch.device(options.device), SHAPES[options.shape]()
    if options.shape == "7b" and device.type != "cuda":
        raise ValueError("--shape 7b needs a GPU with 24 GiB or more: --device cuda (on a CPU it would take hours)")
    result = measure(shape, device, options.budgets, options.text, options.new, options.repeats, options.clock)
    result = {"shape": options.shape, **result, **provenance()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for one in result["rows"]:
        ratios = f"{one['prefill_ratio']:.3f} {one['promised_ratio']:.3f}"
        print(f"{one['method']:<13} {one['budget'] or '':>4} {ratios} {one['settings']}")
    return 0


def measure(
    shape: Shape, device: torch.device, budgets: list[int], n_text: int, n_new: int, repeats: int, clock: str = "wall"
) -> dict[str, Any]:
    """Every contender, in turn, `repeats` times after its FLOPs were counted."""
    start = time.monotonic()
    decoder = cost.DecoderShape.from_config(shape.config.text_config)
    found = contenders(shape, new_model(shape, device), budgets)
    size = shape.config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, size, size, generator=generator).to(device, shape.dtype)
    prompts = {one.key: prompt(one, n_text) for one in found}
    times = {one.key: Times() for one in found}
    flops = {one.key: count(one, prompts[one.key], pixels) for one in found}
    for turn in range(repeats):
        for one in found:
            run_once(one, prompts[one.key], pixels, n_new, times[one.key], clock)
        print(f"round {turn + 1} of {repeats}: {time.monotonic() - start:.0f} s", flush=True)
    rows = [row(one, times[one.key], flops[one.key], n_text, n_new, decoder) for one in found]
    lengths = [n + n_text for n in (sizes_of(shape.config).n_patches, *budgets)]
    return {
        "decoder": asdict(decoder),
        "n_patches": sizes_of(shape.config).n_patches,
        "n_text": n_text,
        "n_new": n_new,
        "repeats": repeats,
        "clock": clock,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": device_name(device),
        "seconds": round(time.monotonic() - start, 1),
        "matmul_gflops_per_s": matmul_rates(decoder, lengths, shape.dtype, device),
        "rows": with_ratios(rows),
    }


if __name__ == "__main__":
    raise SystemExit(main())
