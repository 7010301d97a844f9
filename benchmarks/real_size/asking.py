"""Parts (c), (d) and (e): the first token, the tokens after it, the largest batch, and the bytes that an image is kept in.

Source:  HTC-VLM Table 7 and VoCo-LLaMA Table 8 for what is compared; the numbering is the paper's (text from 581 on).
Differs: one forward pass each, from tensors that lie on the device; `generate` is the same through the public interface.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from htc_vlm.model import CompressedImages
from htc_vlm.model.loading import without_compression
from htc_vlm.ops import rope
from htc_vlm.ops.cost import cache_bytes, count_flops, decode_flops, prefill_flops
from real_size.bench import Bench
from real_size.clock import Journal, captured, entry, time_in_turn
from real_size.floors import Work

MOST_ROWS = 2**15  # tried as one batch
AS_IF_GIB = 80  # of a card, where the largest batch is computed and not tried


def measure(bench: Bench, journal: Journal) -> None:
    """parts.first_token, parts.generate, parts.cache, parts.decode."""
    for batch in bench.shape.ask_batches:
        journal.attempt("first_token", f"b{batch}", lambda batch=batch: first_token(bench, batch))
    journal.attempt("cache", "bytes", lambda: bytes_per_image(bench))
    for batch in bench.shape.ask_batches:
        journal.attempt("generate", f"b{batch}", lambda batch=batch: through_generate(bench, batch))
    some = bench.shape.ask_batches[min(1, len(bench.shape.ask_batches) - 1)]
    journal.attempt("generate", f"answers_b{some}", lambda: answers(bench, some))
    for batch in bench.shape.decode_batches:
        journal.attempt("decode", f"b{batch}", lambda batch=batch: decode(bench, batch))
    journal.attempt("decode", "largest_batch_by_bytes", lambda: largest_by_bytes(bench))
    if bench.device.type == "cuda":
        for n_prefix in prefixes(bench):
            name = f"largest_batch_{n_prefix}_cached"
            journal.attempt("decode", name, lambda n_prefix=n_prefix: largest_batch(bench, n_prefix))
    else:
        journal.skip("decode/largest_batch", "needs a CUDA device that can run out of memory; see largest_batch_by_bytes")


def prefixes(bench: Bench) -> tuple[int, int]:
    """Cached tokens of an image: with a bottleneck, and without."""
    return bench.n_bottleneck, bench.n_patches


# ------------------------------------------------------------------------------------------------ first token
def question_pass(bench: Bench, ids: Tensor, cache: DynamicCache | None, first_position: int) -> Tensor:
    """(B, T) ids over what is cached -> the logits of the first answer token (B, V)."""
    positions = torch.arange(first_position, first_position + ids.shape[1], device=bench.device)[None]
    out = bench.model.model.language_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
    )  # fmt: skip
    logits: Tensor = bench.model.lm_head(out.last_hidden_state[:, -1])
    return logits


def over_cells(bench: Bench, cells: Tensor, ids: Tensor) -> Tensor:
    """As `generate(compressed=...)`: the cells of B images turned to their place, then the question."""
    place = torch.full((len(cells),), bench.n_visual, device=bench.device)
    keys = rope.rotate_keys(cells[:, :, 0], bench.model.model.language_model.rotary_emb.inv_freq, place)
    return question_pass(bench, ids, cache_of(bench, keys, cells[:, :, 1]), bench.n_visual + bench.n_bottleneck)


def cache_of(bench: Bench, keys: Tensor, values: Tensor) -> DynamicCache:
    """(B, layers, kv heads, n, head_dim) each -> a cache that a pass may grow."""
    pairs = list(zip(keys.unbind(1), values.unbind(1), strict=True))
    return DynamicCache(pairs, config=bench.model.model.language_model.config)


def over_patches(bench: Bench, patches: Tensor, ids: Tensor) -> Tensor:
    """Plain LLaVA: patches and question in one causal prefill."""
    inner = bench.model.model
    embeds = torch.cat((patches, inner.get_input_embeddings()(ids)), dim=1)
    state = inner.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1]
    logits: Tensor = bench.model.lm_head(state)
    return logits


def random_cells(bench: Bench, batch: int, n: int) -> Tensor:
    """(B, layers, 2, kv heads, n, head_dim)"""
    decoder = bench.decoder
    return bench.random(batch, decoder.n_layers, 2, decoder.n_kv_heads, n, decoder.head_dim)


@torch.no_grad()
def first_token(bench: Bench, batch: int) -> dict[str, Any]:
    """Milliseconds to the logits of the first answer token."""
    decoder, n_text, n_layers = bench.decoder, bench.shape.n_question, bench.decoder.n_layers
    ids, patches = bench.question(batch), bench.random(batch, bench.n_patches, decoder.width)
    cells = random_cells(bench, batch, bench.n_bottleneck)
    calls: dict[str, Callable[[], Tensor]] = {
        "from_cache": lambda: over_cells(bench, cells, ids),
        "text_only": lambda: question_pass(bench, ids, None, 0),
        "uncompressed": lambda: over_patches(bench, patches, ids),
    }
    none = [0] * n_layers
    computed = {
        "from_cache": batch * prefill_flops(decoder, none, n_text, n_logits=1, n_past=bench.n_bottleneck),
        "text_only": batch * prefill_flops(decoder, none, n_text, n_logits=1),
        "uncompressed": batch * prefill_flops(decoder, [bench.n_patches] * n_layers, n_text, n_logits=1),
    }
    if batch <= 8:  # what keeping all 576 entries would give: as fast, at 576 times the bytes
        kept = random_cells(bench, batch, bench.n_patches)
        calls["from_uncompressed_cache"] = lambda: question_pass(
            bench, ids, cache_of(bench, kept[:, :, 0], kept[:, :, 1]), bench.n_patches
        )
        computed["from_uncompressed_cache"] = batch * prefill_flops(
            decoder, none, n_text, n_logits=1, n_past=bench.n_patches
        )
    cached = {"from_cache": bench.n_bottleneck, "from_uncompressed_cache": bench.n_patches}
    work = {
        name: Work(
            count_flops(call),
            bench.layer_bytes + bench.head_bytes + batch * entry_bytes(bench) * cached.get(name, 0),
        )
        for name, call in calls.items()
    }
    return {**bench.time(calls, work), "flops_computed": computed}


def entry_bytes(bench: Bench) -> int:
    """Bytes of one token's keys and values in all layers."""
    return cache_bytes(bench.decoder, [1] * bench.decoder.n_layers, bytes_per_value=bench.dtype.itemsize)


@torch.no_grad()
def through_generate(bench: Bench, batch: int) -> dict[str, Any]:
    """The first token through `generate`, as a program asks: host work, placing and checks included."""
    model, ids = bench.model, bench.question(batch)
    twin = without_compression(model)
    cells = CompressedImages(random_cells(bench, batch, bench.n_bottleneck), model.recipe().digest, bench.n_visual)
    features = bench.random(batch, bench.n_patches, model.config.vision_config.hidden_size)
    placeholders = ids.new_full((batch, bench.n_patches), model.config.image_token_index)
    with_image = torch.cat((placeholders, ids), dim=1)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}

    def ask(asked: Any, prompt: Tensor, **image: Any) -> Tensor:
        ids_out: Tensor = asked.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **image, **options)
        return ids_out

    calls: dict[str, Callable[[], Tensor]] = {
        "from_cache": lambda: ask(model, ids, compressed=cells),
        "text_only": lambda: ask(twin, ids),
        "uncompressed": lambda: ask(twin, with_image, patch_features=features),
    }
    work = {name: Work(count_flops(call), bench.layer_bytes + bench.head_bytes) for name, call in calls.items()}
    return bench.time(calls, work, graphs=False)


@torch.no_grad()
def answers(bench: Bench, batch: int) -> dict[str, Any]:
    """Whole answers of n_new tokens through `generate`, over a cache that grows and over a static one, which transformers
    compiles the decoding for on a GPU (while warming up)."""
    model, ids, n_new, decoder = bench.model, bench.question(batch), bench.shape.n_new, bench.decoder
    cells = CompressedImages(random_cells(bench, batch, bench.n_bottleneck), model.recipe().digest, bench.n_visual)
    sides: dict[str, tuple[Any, dict[str, Any], int]] = {
        "from_cache": (model, {"compressed": cells}, bench.n_bottleneck), "text_only": (without_compression(model), {}, 0),
    }  # fmt: skip
    calls, work = {}, {}
    for side, (asked, image, n_past) in sides.items():
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, **image}
        options |= {"max_new_tokens": n_new, "min_new_tokens": n_new}
        cached = [n_past] * decoder.n_layers
        flops = prefill_flops(decoder, [0] * decoder.n_layers, bench.shape.n_question, n_logits=1, n_past=n_past)
        flops += decode_flops(decoder, cached, bench.shape.n_question, n_new - 1)
        for kind in ("dynamic", "static"):
            calls[f"{side}_{kind}"] = partial(asked.generate, cache_implementation=kind, **options)
            work[f"{side}_{kind}"] = Work(batch * flops, n_new * (bench.layer_bytes + bench.head_bytes))
    times = time_in_turn(calls, bench.device, warmup=2, repeats=max(2, bench.shape.repeats // 3))
    out = {name: entry(times[name], work[name], bench.ceilings) for name in calls}
    for one in out.values():
        one["tokens_per_s"] = 1000 * batch * n_new / one["ms"]
    return out


# ------------------------------------------------------------------------------------------------ cache
@torch.no_grad()
def bytes_per_image(bench: Bench) -> dict[str, Any]:
    """What `compress` returns for one image, and the keys and values that a plain prefill of its patches leaves."""
    size = bench.model.config.vision_config.image_size
    cells = bench.model.compress(pixel_values=bench.random(1, 3, size, size))
    patches = bench.random(1, bench.n_patches, bench.decoder.width)
    cache = bench.model.model.language_model(inputs_embeds=patches, use_cache=True).past_key_values
    uncompressed = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"compressed": cells.nbytes, "uncompressed": uncompressed, "ratio": cells.nbytes / uncompressed}


# ------------------------------------------------------------------------------------------------ decode
class Decoder:
    """B rows over n_prefix + n_question cached tokens; each `step` writes one token more, on the device alone."""

    def __init__(self, bench: Bench, batch: int, n_prefix: int) -> None:
        self.bench, self.n_past = bench, n_prefix + bench.shape.n_question
        decoder, device = bench.decoder, bench.device
        self.cache = StaticCache(
            config=bench.model.model.language_model.config, max_cache_len=self.n_past + bench.shape.n_new
        )
        self.cache.early_initialization(batch, decoder.n_kv_heads, decoder.head_dim, bench.dtype, device)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.token = bench.question(batch)[:, :1].contiguous()
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.rewind()

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.n_past)
        self.position.fill_(self.n_past)

    def step(self) -> Tensor:
        """-> the token that was written (B, 1)."""
        out = self.bench.model.model.language_model(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        )
        self.token.copy_(self.bench.model.lm_head(out.last_hidden_state).argmax(-1))
        self.position.add_(1)
        return self.token


@torch.no_grad()
def decode(bench: Bench, batch: int) -> dict[str, Any]:
    """n_new steps over an image of 1 and of 576 cached tokens, and over none."""
    shape = bench.shape
    out: dict[str, Any] = {}
    for name, n_prefix in zip(("text_only", "compressed", "uncompressed"), (0, *prefixes(bench)), strict=True):
        decoder = Decoder(bench, batch, n_prefix)
        out[name] = decode_entry(bench, decoder, decoder.step, batch, n_prefix)
        if bench.device.type == "cuda":
            decoder.rewind()
            try:
                replay, _ = captured(decoder.step)
                out[f"{name}_graph"] = decode_entry(bench, decoder, replay, batch, n_prefix)
                del replay
            except RuntimeError as error:
                out[f"{name}_graph_not_measured"] = str(error).splitlines()[0][:300]
        del decoder
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    flops = decode_flops(bench.decoder, [0] * bench.decoder.n_layers, shape.n_question, shape.n_new)
    return {**out, "flops_computed_text_only": batch * flops}


def decode_entry(bench: Bench, decoder: Decoder, step: Callable[[], object], batch: int, n_prefix: int) -> dict[str, Any]:
    """One entry for all n_new steps; FLOPs over the true lengths, bytes of the weights and of the cache in each step."""
    shape, layers = bench.shape, bench.decoder.n_layers

    def steps() -> None:
        decoder.rewind()
        for _ in range(shape.n_new):
            step()

    times = time_in_turn({"decode": steps}, bench.device, warmup=1, repeats=max(3, shape.repeats // 2))["decode"]
    n_text = shape.n_question
    flops = batch * decode_flops(bench.decoder, [n_prefix] * layers, n_text, shape.n_new)
    n_cached = sum(n_prefix + n_text + i for i in range(shape.n_new))
    n_bytes = shape.n_new * (bench.layer_bytes + bench.head_bytes) + batch * n_cached * entry_bytes(bench)
    one = entry(times, Work(flops, n_bytes), bench.ceilings, batch=batch, n_prefix=n_prefix)
    return {**one, "tokens_per_s": 1000 * batch * shape.n_new / one["ms"], "step_ms": one["ms"] / shape.n_new}


def bytes_per_row(bench: Bench, n_prefix: int) -> int:
    """Of the cache of one prompt with one image, to the end of its answer."""
    return (n_prefix + bench.shape.n_question + bench.shape.n_new) * entry_bytes(bench)


def largest_by_bytes(bench: Bench) -> dict[str, Any]:
    """Rows whose caches fit beside the weights in AS_IF_GIB: computed, for a batch of one image and one question each."""
    left = AS_IF_GIB * 2**30 - sum(weight.nbytes for weight in bench.model.parameters())
    rows = {n_prefix: left // bytes_per_row(bench, n_prefix) for n_prefix in prefixes(bench)}
    few, many = prefixes(bench)
    return {
        "memory_gib": AS_IF_GIB,
        "bytes_per_row": {f"{n}_cached": bytes_per_row(bench, n) for n in rows},
        "rows": {f"{n}_cached": count for n, count in rows.items()},
        "ratio": bytes_per_row(bench, many) / bytes_per_row(bench, few),
    }


def fits(bench: Bench, batch: int, n_prefix: int) -> bool:
    """Does one decode step of `batch` rows run?"""
    try:
        decoder = Decoder(bench, batch, n_prefix)
        decoder.step()
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False


@torch.no_grad()
def largest_batch(bench: Bench, n_prefix: int) -> dict[str, Any]:
    """The largest batch that decodes, tried to within 2 %, and its speed."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    most = free // bytes_per_row(bench, n_prefix) + 1  # cannot fit: its cache alone does not
    low, high = 0, min(most, MOST_ROWS)
    while high - low > max(1, high // 50):
        middle = (2 * low + 3 * high) // 5 if low == 0 else (low + high) // 2
        if fits(bench, middle, n_prefix):
            low = middle
        else:
            high = middle
        torch.cuda.empty_cache()
    if not low:
        raise ValueError(f"not one row of {n_prefix} cached tokens fits")
    decoder = Decoder(bench, low, n_prefix)
    torch.cuda.reset_peak_memory_stats()
    speed = decode_entry(bench, decoder, decoder.step, low, n_prefix)
    return {"rows": low, "peak_bytes": torch.cuda.max_memory_allocated(), "speed": speed}
