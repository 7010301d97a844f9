"""FLOPs computed equal FLOPs counted, on real decoders without weights; and the figures of the 7B model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModel,
    DynamicCache,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Starcoder2Config,
)

from htc_vlm.ops.cost import LLAMA_7B, DecoderShape, cache_bytes, count_flops, decode_flops, prefill_flops

SMALL = LlamaConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=101,
)  # fmt: skip
VICUNA_7B = LlamaConfig(  # its widths, and four of its equal layers: each layer is counted
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32064,
)  # fmt: skip
SIZES = pytest.mark.parametrize("config", [SMALL, VICUNA_7B], ids=["small", "7b"])


def with_attention(config: LlamaConfig, name: str) -> LlamaConfig:
    config = LlamaConfig(**config.to_dict())
    config._attn_implementation = name
    return config


@SIZES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_computed_prefill_equals_counted_prefill(config: LlamaConfig, attention: str) -> None:
    """A forgotten matrix, or grouped key heads counted in full, shifts every ratio of the table."""
    with torch.device("meta"):
        model = LlamaModel(with_attention(config, attention))
    states = torch.empty(1, 37, config.hidden_size, device="meta")
    counted = count_flops(lambda: model(inputs_embeds=states, past_key_values=DynamicCache(config=config)))
    shape = DecoderShape.from_config(config)
    assert counted == prefill_flops(shape, [30] * shape.n_layers, n_text=7)


@pytest.mark.parametrize("kind", [Qwen2Config, PhiConfig, Starcoder2Config, MistralConfig, GemmaConfig])
def test_other_decoders_are_counted_as_they_run(kind: Any) -> None:
    """Configurations of Qwen2 and Phi have no head_dim, which was a traceback; Phi's MLP has no gate."""
    config = kind(
        hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    states = torch.empty(1, 37, config.hidden_size, device="meta")
    shape = DecoderShape.from_config(config)
    assert count_flops(lambda: model(inputs_embeds=states)) == prefill_flops(shape, [30] * 3, n_text=7)


def test_a_decoder_without_these_widths_is_refused_by_name() -> None:
    """OPT calls the width of its MLP otherwise."""
    with pytest.raises(ValueError, match="language model 'opt' cannot be counted: its configuration has no intermediate_size"):
        DecoderShape.from_config(OPTConfig())


@SIZES
def test_computed_schedule_equals_layers_run_at_those_lengths(config: LlamaConfig) -> None:
    """The cost of dropping inside the model is the sum over layers, not the cost at the mean length."""
    with torch.device("meta"):
        model = LlamaModel(with_attention(config, "sdpa"))
    shape = DecoderShape.from_config(config)
    schedule = [50] * 2 + [11] * (shape.n_layers - 2)

    def run() -> None:
        for layer, n_visual in zip(model.layers, schedule, strict=True):
            states = torch.empty(1, n_visual + 5, config.hidden_size, device="meta")
            positions = torch.empty(1, n_visual + 5, dtype=torch.long, device="meta")
            layer(states, position_embeddings=model.rotary_emb(states, positions))

    assert count_flops(run) == prefill_flops(shape, schedule, n_text=5)


def test_attention_on_the_cpu_is_counted() -> None:
    """torch's own table lacks the CPU kernel: attention would cost nothing (pytorch#195460)."""
    model = LlamaModel(with_attention(SMALL, "sdpa")).eval()
    counted = count_flops(lambda: model(inputs_embeds=torch.zeros(2, 9, 64), use_cache=True))
    assert counted == 2 * prefill_flops(DecoderShape.from_config(SMALL), [0] * 3, n_text=9)
    q = torch.zeros(3, 4, 8, 16)
    assert count_flops(lambda: scaled_dot_product_attention(q, q, q)) == 3 * 4 * (2 * 8 * 8 * 16) * 2


def test_generation_costs_what_decode_says() -> None:
    """Each new token attends to the cache, the earlier new tokens and itself."""
    with torch.device("meta"):
        model = LlamaForCausalLM(with_attention(SMALL, "sdpa"))
    shape = DecoderShape.from_config(SMALL)
    cache = DynamicCache(config=SMALL)
    counted = count_flops(
        lambda: model(inputs_embeds=torch.empty(1, 20, 64, device="meta"), past_key_values=cache, logits_to_keep=1)
    )
    assert counted == prefill_flops(shape, [15] * 3, n_text=5, n_logits=1)

    def decode() -> None:
        for _ in range(4):
            model(inputs_embeds=torch.empty(1, 1, 64, device="meta"), past_key_values=cache, logits_to_keep=1)

    assert count_flops(decode) == decode_flops(shape, [15] * 3, n_text=5, n_new=4)


def test_a_question_over_a_stored_bottleneck_costs_its_text() -> None:
    """The gain of compress-once: 8.18 TFLOPs for 576 patches and 40 text tokens, 0.519 over one stored cell."""
    assert round(prefill_flops(LLAMA_7B, [576] * 32, n_text=40, n_logits=1) / 1e12, 3) == 8.178
    assert round(prefill_flops(LLAMA_7B, [0] * 32, n_text=40, n_past=1, n_logits=1) / 1e12, 3) == 0.519
    assert round(prefill_flops(LLAMA_7B, [581] * 32, n_text=0, n_logits=1) / 1e12, 3) == 7.702


def test_causal_pairs_are_half_and_the_diagonal() -> None:
    """Dense counting charges the upper triangle, which flash kernels skip."""
    shape = DecoderShape(width=2, mlp_width=1, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, n_vocabulary=3)
    linear = 3 * (2 * 2 * 2 * 4 + 2 * 3 * 2)  # three tokens: four 2x2 matrices, three of 2x1
    assert prefill_flops(shape, [3], n_text=0) == linear + 2 * 2 * 9 * 2
    assert prefill_flops(shape, [3], n_text=0, causal=True) == linear + 2 * 2 * 6 * 2


def test_cache_bytes_of_the_7b_model() -> None:
    """32 layers x keys and values x 32 heads x 128 x 2 bytes = 524,288 per token (docs/specs/ecosystem.md section 4)."""
    assert cache_bytes(LLAMA_7B, [1] * 32) == 524_288
    assert cache_bytes(LLAMA_7B, [576] * 2 + [98] * 30, n_text=10) == (576 * 2 + 98 * 30 + 320) * 524_288 // 32
    grouped = DecoderShape.from_config(SMALL)
    assert cache_bytes(grouped, [1, 1, 1], bytes_per_value=4) == 3 * 2 * 2 * 16 * 4


def test_a_schedule_of_another_depth_is_refused() -> None:
    """zip would cut it short and the method would look cheaper."""
    with pytest.raises(ValueError, match="the decoder has 32 layers, got 2 numbers"):
        prefill_flops(LLAMA_7B, [576, 576], n_text=1)
