"""What a token schedule costs: FLOPs, counted or computed, and bytes of key-value cache.

Source:  torch.utils.flop_counter; docs/specs/ecosystem.md section 7 (tools compared); Kaplan et al. 2020 for the
         convention that a multiply-add is two FLOPs and only matrix products count.
Differs: torch does not count attention on the CPU (pytorch#195460, the kernel is missing from its table); we add it.
         FLOPs are dense, as every kernel with a mask computes them; `causal=True` credits what causality saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """A silent FlopCounterMode that also counts attention on the CPU.

    >>> q = torch.zeros(1, 2, 8, 4)
    >>> with torch.no_grad(), flop_counter() as counter:
    ...     _ = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> counter.get_total_flops() == 2 * (2 * 2 * 8 * 8 * 4)    # heads * (two products of 2 * 8 * 8 * 4)
    True
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _cpu_sdpa_flops})


def _cpu_sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of `call()`, without gradients. On the meta device it counts true shapes without weights or arithmetic."""
    with torch.no_grad(), flop_counter() as counter:
        call()
    return int(counter.get_total_flops())


WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
UNGATED = ("gpt_neox", "nemotron", "persimmon", "phi", "starcoder2")  # model types whose MLP has two matrices


@dataclass(frozen=True)
class DecoderShape:
    """Widths of a Llama-like decoder: gated MLP of three matrices (or two, without a gate), no biases counted."""

    width: int
    mlp_width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocabulary: int
    n_mlp_matrices: int = 3

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """From a text config (`model.config.text_config` of a LLaVA), with what is meant where head_dim (Qwen2, Phi) or
        num_key_value_heads is not there. ValueError for one without the other widths."""
        kind = getattr(config, "model_type", type(config).__name__)
        lacks = [name for name in WIDTHS if not hasattr(config, name)]
        if lacks:
            raise ValueError(f"the language model {kind!r} cannot be counted: its configuration has no {', '.join(lacks)}")
        return cls(
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            n_vocabulary=config.vocab_size,
            n_mlp_matrices=2 if kind in UNGATED else 3,
        )


LLAMA_7B = DecoderShape(
    width=4096, mlp_width=11008, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, n_vocabulary=32064
)


def prefill_flops(
    shape: DecoderShape,
    schedule: Sequence[int],
    n_text: int,
    n_logits: int = 0,
    n_past: int = 0,
    causal: bool = False,
) -> int:
    """FLOPs of one forward pass of one sample through the decoder.

    schedule: visual tokens that enter each layer; n_text: all other tokens, in every layer; n_logits: positions
    that the output matrix is applied to (generation needs 1; the decoder alone, 0); n_past: tokens already in the
    cache, of every layer. Not counted: the vision tower, the projector, and a method's scores.

    576 patches and 40 text tokens through LLaVA-1.5-7B, in TFLOPs (docs/specs/ecosystem.md section 7):

    >>> round(prefill_flops(LLAMA_7B, [576] * 32, n_text=40, n_logits=1) / 1e12, 3)
    8.178
    """
    _check_schedule(shape, schedule)
    total = 0
    for n_visual in schedule:
        n = n_visual + n_text
        n_pairs = n * n_past + (n * (n + 1) // 2 if causal else n * n)
        total += n * _linear_flops_per_token(shape) + 4 * n_pairs * shape.n_heads * shape.head_dim
    return total + 2 * n_logits * shape.width * shape.n_vocabulary


def decode_flops(shape: DecoderShape, schedule: Sequence[int], n_text: int, n_new: int) -> int:
    """FLOPs of generating `n_new` tokens over a cache of schedule + n_text entries, output matrix included."""
    _check_schedule(shape, schedule)
    n_keys = sum(n_new * (n_visual + n_text) + n_new * (n_new + 1) // 2 for n_visual in schedule)
    linear = n_new * (shape.n_layers * _linear_flops_per_token(shape) + 2 * shape.width * shape.n_vocabulary)
    return linear + 4 * n_keys * shape.n_heads * shape.head_dim


def cache_bytes(shape: DecoderShape, cached: Sequence[int], n_text: int = 0, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of one sample; `cached` has the visual tokens that each layer keeps in its cache.

    That is the schedule for methods that drop tokens, and the bottleneck tokens for VoCo-LLaMA and HTC-VLM: one of
    them in fp16 is half a MiB, against 288 MiB for 576 patches.

    >>> cache_bytes(LLAMA_7B, [1] * 32), cache_bytes(LLAMA_7B, [576] * 32) // 2**20
    (524288, 288)
    """
    _check_schedule(shape, cached)
    return sum(n + n_text for n in cached) * 2 * shape.n_kv_heads * shape.head_dim * bytes_per_value


def _linear_flops_per_token(shape: DecoderShape) -> int:
    """One layer: query, key, value, output and the MLP's matrices."""
    attention = 2 * shape.width * shape.head_dim * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    return attention + 2 * shape.n_mlp_matrices * shape.width * shape.mlp_width


def _check_schedule(shape: DecoderShape, schedule: Sequence[int]) -> None:
    if len(schedule) != shape.n_layers:
        raise ValueError(f"the decoder has {shape.n_layers} layers, got {len(schedule)} numbers; give one per layer")


def fast_compress_flops(shape: DecoderShape, n_visual: int, n_bottleneck: int = 1) -> int:
    """FLOPs of compressing one image where visual tokens attend only to themselves (model/fast_prefill.py).

    Visual rows have no query and no scores, are keys and values alone in the layer before the last, and are not in the
    last. Beside the dense masked pass of HTC-VLM at 7B, [580 visual; 1 bottleneck], in TFLOPs:

    >>> dense = prefill_flops(LLAMA_7B, [581] * 32, n_text=0)
    >>> fast = fast_compress_flops(LLAMA_7B, n_visual=580)
    >>> round(dense / 1e12, 2), round(fast / 1e12, 2), round(fast / dense, 3)
    (7.7, 6.51, 0.845)
    """
    n_rows = n_visual + n_bottleneck
    all_heads, kv_heads = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    keys_and_values = 2 * shape.width * 2 * kv_heads  # of one row
    mlp = 2 * shape.n_mlp_matrices * shape.width * shape.mlp_width
    rest = 2 * shape.width * all_heads + mlp  # of one row: output projection and MLP
    looking = n_bottleneck * (2 * shape.width * all_heads + 4 * n_rows * all_heads)  # queries, scores and their sums
    total = 0
    for layer in range(shape.n_layers):
        left = shape.n_layers - 1 - layer
        total += (n_rows if left else n_bottleneck) * keys_and_values
        total += (looking if left else 0) + (n_rows if left > 1 else n_bottleneck if left else 0) * rest
    return total
