"""Part (b): pictures into cells, beside the masked pass that does the same densely and the plain prefill of a LLaVA.

Source:  HTC-VLM section 4.2; VoCo-LLaMA section 3 for what is compared.
Differs: the ratios compare the language model's part, from the same visual tokens; `shares` has the whole way from pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from htc_vlm.applied import hf_compat
from htc_vlm.model import fast_prefill
from htc_vlm.ops.cost import count_flops, fast_compress_flops, prefill_flops
from htc_vlm.tokens import TokenLayout
from real_size.bench import Bench, bytes_of
from real_size.clock import Journal, entry, relative_difference, time_in_turn
from real_size.floors import Work


def measure(bench: Bench, journal: Journal) -> None:
    """parts.compress: b1, b8, ...; shares of each component; a compiled fast path where there is CUDA."""
    for batch in bench.shape.compress_batches:
        journal.attempt("compress", f"b{batch}", lambda batch=batch: at_batch(bench, batch))
    batch = 8 if 8 in bench.shape.compress_batches else bench.shape.compress_batches[-1]
    journal.attempt("compress", f"shares_b{batch}", lambda: shares(bench, batch))


def dense_masked(bench: Bench, batch: int) -> Callable[[], Tensor]:
    """Hugging Face's own pass over [visual; bottleneck] with sdpa, its mask made beforehand; -> the last cells' keys."""
    inner = bench.model.model
    embeds = bench.random(batch, bench.n_visual + bench.n_bottleneck, bench.decoder.width)
    kind = TokenLayout.from_string("v" * bench.n_visual + "b" * bench.n_bottleneck).kind.to(bench.device)
    visible = inner.compressor.visible(TokenLayout.from_kind(kind.expand(batch, -1)))
    mask = hf_compat.ready_mask(inner.language_model.config, embeds, None, visible)
    positions = torch.arange(embeds.shape[1], device=bench.device).expand(batch, -1)

    def call() -> Tensor:
        out = inner.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True)
        keys: Tensor = out.past_key_values.layers[-1].keys[:, :, -bench.n_bottleneck :]
        return keys

    return call


def causal(bench: Bench, batch: int) -> Callable[[], Tensor]:
    """Plain LLaVA: a causal prefill of the patches; -> the last state."""
    patches = bench.random(batch, bench.n_patches, bench.decoder.width)

    def call() -> Tensor:
        state: Tensor = bench.model.model.language_model(inputs_embeds=patches, use_cache=True).last_hidden_state[:, -1]
        return state

    return call


@torch.no_grad()
def at_batch(bench: Bench, batch: int) -> dict[str, Any]:
    """Milliseconds, images/s and floors of one batch."""
    inner = bench.model.model
    visual = bench.random(batch, bench.n_visual, bench.decoder.width)
    calls: dict[str, Callable[[], Tensor]] = {
        "fast": lambda: inner.compress_visual(visual, path="auto"),
        "general": lambda: inner.compress_visual(visual, path="general"),
        "dense_masked": dense_masked(bench, batch),
        "causal_patches": causal(bench, batch),
    }
    work = {name: Work(count_flops(call), bench.layer_bytes) for name, call in calls.items()}
    few = min(batch, 2)
    difference = relative_difference(
        inner.compress_visual(visual[:few], path="auto"), inner.compress_visual(visual[:few], path="general")
    )
    # `general` makes its mask on the host: nothing that a graph could replay.
    plain = bench.time(calls, work, graphs=False)
    if bench.device.type == "cuda":
        plain |= bench.time({"fast": calls["fast"]}, work)
    for one in plain.values():
        if isinstance(one, dict):
            one["images_per_s"] = 1000 * batch / one["ms"]
    masked, patches = bench.n_visual + bench.n_bottleneck, bench.n_patches
    n_layers = bench.decoder.n_layers
    return {
        **plain,
        "fast_vs_general_difference": difference,
        "flops_computed": {
            "fast": batch * fast_compress_flops(bench.decoder, bench.n_visual, bench.n_bottleneck),
            "dense_masked": batch * prefill_flops(bench.decoder, [masked] * n_layers, n_text=0),
            "causal_patches": batch * prefill_flops(bench.decoder, [patches] * n_layers, n_text=0),
            "causal_patches_half_counted": batch * prefill_flops(bench.decoder, [patches] * n_layers, n_text=0, causal=True),
        },
    }


@torch.no_grad()
def shares(bench: Bench, batch: int) -> dict[str, Any]:
    """From pixels to cells: the whole, and each component alone."""
    model, compressor = bench.model, bench.model.model.compressor
    size = model.config.vision_config.image_size
    pixels = bench.random(batch, 3, size, size)
    features = model.model.vision_features(pixel_values=pixels)
    unit = model.model.denormalise(pixels)
    code = compressor.encode(unit).to(bench.dtype)
    visual = model.visual_tokens(pixel_values=pixels)
    exact = copy.deepcopy(compressor).float() if bench.dtype != torch.float32 else compressor
    calls: dict[str, Callable[[], Any]] = {
        "whole": lambda: model.compress(pixel_values=pixels),
        "vision_tower": lambda: model.model.vision_features(pixel_values=pixels),
        "quantizer": lambda: compressor.encode(unit),
        "anchor_mlp": lambda: compressor.to_anchors(code.flatten(1)),
        "projector": lambda: model.model.multi_modal_projector(features),
        "language_model": lambda: model.model.compress_visual(visual),
        "quantizer_float32": lambda: exact.encode(unit),
    }
    parts: dict[str, list[nn.Module]] = {
        "vision_tower": [model.model.vision_tower],
        "quantizer": [compressor.quantizer],
        "anchor_mlp": [compressor.to_anchors],
        "projector": [model.model.multi_modal_projector],
        "language_model": [model.model.language_model.layers],
        "quantizer_float32": [exact.quantizer],
    }
    parts["whole"] = [module for name in parts if name != "quantizer_float32" for module in parts[name]]
    times = time_in_turn(calls, bench.device, bench.shape.warmup, bench.shape.repeats)
    out = {
        name: entry(times[name], Work(count_flops(call), sum(map(bytes_of, parts[name]))), bench.ceilings)
        for name, call in calls.items()
    }
    for one in out.values():
        one["share_of_whole"] = one["ms"] / out["whole"]["ms"]
        one["images_per_s"] = 1000 * batch / one["ms"]
    same = (exact.encode(unit).to(bench.dtype) == code).all(dim=-1).float().mean()
    return {**out, "codes_equal_to_float32": float(same)}


@torch.no_grad()
def compiled(bench: Bench, batch: int, backend: str = "inductor") -> dict[str, Any]:
    """The fast path with its layer under torch.compile (one graph serves all layers): what fusing element-wise steps gains."""
    visual = bench.random(batch, bench.n_visual, bench.decoder.width)

    def call() -> Tensor:
        return bench.model.model.compress_visual(visual, path="fast")

    expected, flops = call(), count_flops(call)
    plain = fast_prefill._layer
    fast_prefill._layer = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)
    try:
        first_s = time_in_turn({"compile": call}, bench.device, warmup=0, repeats=1)["compile"][0] / 1000
        difference = relative_difference(call(), expected)
        times = time_in_turn({"compiled": call}, bench.device, bench.shape.warmup, bench.shape.repeats)["compiled"]
    finally:
        fast_prefill._layer = plain
    one = entry(times, Work(flops, bench.layer_bytes), bench.ceilings, difference_from_plain=difference, first_call_s=first_s)
    one["images_per_s"] = 1000 * batch / one["ms"]
    return one
