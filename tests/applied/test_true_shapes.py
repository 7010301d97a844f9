"""The shapes of public models: what is counted without weights is what a model of that shape computes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from htc_vlm import compressors
from htc_vlm.applied.true_shapes import SHAPES
from htc_vlm.ops import cost


def kv_bytes(name: str) -> int:
    """Of one token in fp16."""
    shape = SHAPES[name].decoder
    return cost.cache_bytes(shape, [1] * shape.n_layers)


def test_a_token_of_each_model_costs_what_its_heads_cost() -> None:
    """LLaVA-1.5 512 KiB, Qwen2.5-VL 28 layers x 4 heads x 128 x 2 x 2 bytes = 56 KiB."""
    assert [kv_bytes(name) // 1024 for name in ("llava-1.5-7b", "qwen2.5-vl-7b", "internvl3-8b")] == [512, 56, 56]
    assert [kv_bytes(name) // 1024 for name in ("llava-onevision-qwen2-7b", "smolvlm-2.2b", "qwen3-vl-8b")] == [56, 192, 144]


@pytest.mark.parametrize(
    ("name", "height", "width", "tokens"),
    [
        ("llava-1.5-7b", 480, 640, 576),
        ("llava-1.6-vicuna-7b", 672, 672, 576 + 48 * 49),  # four whole tiles, a newline for each of 48 rows
        ("llava-onevision-qwen2-7b", 384, 384, 729 + 27 * 28),  # one tile beside the overview
        ("internvl3-8b", 448, 448, 256),
        ("smolvlm-2.2b", 512, 512, 17 * 81),  # 4 x 4 tiles and the overview
        ("qwen2.5-vl-7b", 480, 640, 17 * 23),  # sides of 476 and 644 pixels, squares of 28
        ("qwen3-vl-8b", 480, 640, 15 * 20),
    ],
)
def test_pictures_have_the_tokens_that_their_processors_make(name: str, height: int, width: int, tokens: int) -> None:
    """A cost at 576 tokens says nothing about a model that reads tiles."""
    assert SHAPES[name].visual_tokens(height, width) == tokens


@pytest.mark.parametrize(
    ("name", "make", "config"),
    [("smolvlm-2.2b", LlamaForCausalLM, LlamaConfig), ("qwen3-vl-8b", Qwen3ForCausalLM, Qwen3Config)],
)
def test_the_formula_is_what_a_decoder_of_that_shape_computes(name: str, make: type, config: type) -> None:
    """Two layers at the true widths on the meta device, which does no arithmetic."""
    shape = SHAPES[name].decoder
    text = config(
        hidden_size=shape.width, intermediate_size=shape.mlp_width, num_hidden_layers=2, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads, head_dim=shape.head_dim, vocab_size=shape.n_vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        model = make(text)
        embeds = torch.empty(1, 50, shape.width)
    cache = DynamicCache(config=text)
    counted = cost.count_flops(lambda: model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1))
    assert counted == cost.prefill_flops(cost.DecoderShape.from_config(text), [10, 10], n_text=40, n_logits=1)


def test_methods_that_a_model_refuses_are_not_counted() -> None:
    """`cost` told what VisionZip saves on models that cannot run it."""
    visionzip, pool = compressors.build("visionzip"), compressors.build("avg_pool", n_tokens=4)
    assert SHAPES["llava-1.5-7b"].refusal(visionzip, 576) is None
    assert "acts in a CLIP tower" in str(SHAPES["qwen2.5-vl-7b"].refusal(visionzip, 391))
    assert SHAPES["internvl3-8b"].refusal(pool, 256) is None
    assert "which 3 tiles do not have in common" in str(SHAPES["internvl3-8b"].refusal(pool, 768))
