"""The fast compress path: same kv as the masked pass, for every decoder it says it knows; refused by name elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GraniteConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration, fast_prefill
from htc_vlm.ops import cost

from ..tinies import BOTTLENECK, IMAGE, N_PATCHES, N_VOCABULARY, batch, build, pixels, shared, vision_config

VOCO = {"name": "voco", "visual_attention": "self"}
N_VISUAL = 11


def model_with(text: PreTrainedConfig, n_bottleneck: int = 1, attention: str = "sdpa") -> HtcVlmForConditionalGeneration:
    """A random model around this decoder, in evaluation mode."""
    config = HtcVlmConfig(
        vision_config=vision_config(), text_config=text, image_token_index=IMAGE, bottleneck_token_id=BOTTLENECK,
        compressor={**VOCO, "n_bottleneck": n_bottleneck}, image_seq_length=N_PATCHES, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HtcVlmForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # 0 or 1 by default: a forgotten one would not show
                nn.init.normal_(parameter, std=0.3)
    return model


def decoder(kind: type[PreTrainedConfig] = LlamaConfig, **changed: Any) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": N_VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    }  # fmt: skip
    return kind(**{**sizes, **changed})


def visual_tokens(model: HtcVlmForConditionalGeneration, n_images: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    width = model.config.text_config.hidden_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n_images, N_VISUAL, width, generator=generator).to(model.device, dtype)


def both(model: HtcVlmForConditionalGeneration, **kwargs: Any) -> tuple[Tensor, Tensor]:
    visual = visual_tokens(model, **kwargs)
    return tuple(model.model.compress_visual(visual, path=path) for path in ("fast", "general"))  # type: ignore[return-value]


DECODERS = {
    "llama, grouped heads": decoder(),
    "llama, every head its own": decoder(num_key_value_heads=4),
    "llama, one key-value head": decoder(num_key_value_heads=1),
    "llama, biases": decoder(attention_bias=True, mlp_bias=True),
    "llama, wide heads": decoder(head_dim=16),
    "llama, scaled positions": decoder(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    ),
    "one layer": decoder(num_hidden_layers=1),
    "two layers": decoder(num_hidden_layers=2),
    "mistral": decoder(MistralConfig, sliding_window=None),
    "mistral, window as wide as an image": decoder(MistralConfig, sliding_window=N_VISUAL + 3),
    "qwen2": decoder(Qwen2Config),
    "qwen3": decoder(Qwen3Config, head_dim=8),
}


@pytest.mark.parametrize("n_bottleneck", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_every_known_decoder_gives_the_cells_of_the_masked_pass(name: str, n_bottleneck: int) -> None:
    """Heads given another group's value, a bias or a scale left out, one layer too few or too many."""
    fast, general = both(model_with(DECODERS[name], n_bottleneck))
    assert general.abs().max() > 0.1
    torch.testing.assert_close(fast, general, atol=1e-5, rtol=0)


def test_eager_models_take_it_too() -> None:
    """The path has its own attention; it must agree with whatever the model would have used."""
    fast, general = both(model_with(decoder(), 3, attention="eager"))
    torch.testing.assert_close(fast, general, atol=1e-5, rtol=0)


def test_flash_attention_is_no_hindrance() -> None:
    """Where the masked pass refuses (flash attention ignores masks), the fast path needs no mask."""
    model = model_with(decoder())
    expected = model.model.compress_visual(visual_tokens(model), path="general")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        model.model.compress_visual(visual_tokens(model), path="general")
    torch.testing.assert_close(model.model.compress_visual(visual_tokens(model)), expected, atol=1e-5, rtol=0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by cutting the batch; an image must not be lost or doubled at the cut. 12 rows each."""
    model = model_with(decoder())
    whole = model.model.compress_visual(visual_tokens(model, 5))
    for max_rows in (24, 13, 1):
        monkeypatch.setattr(fast_prefill, "MAX_ROWS", max_rows)
        cut = model.model.compress_visual(visual_tokens(model, 5))
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)


def test_the_visual_tokens_given_are_not_written_to() -> None:
    """The path works in place on its own rows."""
    model = model_with(decoder())
    visual = visual_tokens(model)
    before = visual.clone()
    model.model.compress_visual(visual, path="fast")
    assert visual.equal(before)


def test_lora_is_obeyed() -> None:
    """A path that reads weights instead of calling modules would compress with the model before its fine-tuning."""
    peft = pytest.importorskip("peft")
    model = model_with(decoder())
    plain, _ = both(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = rf".*language_model.*\.({'|'.join(names)})"
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval()
    fast, general = both(tuned.base_model.model)
    assert (fast - plain).abs().max() > 0.1
    torch.testing.assert_close(fast, general, atol=1e-5, rtol=1e-5)  # random adapters make large values


def test_half_precision_is_no_worse_than_the_masked_pass() -> None:
    """bfloat16 has three digits; the path may round elsewhere, but not more."""
    model = model_with(decoder(), 3)
    _, exact = both(model)
    fast, general = both(model.to(torch.bfloat16), dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    errors = [(kv.float() - exact).abs().mean() for kv in (fast, general)]
    assert errors[0] < 1.5 * errors[1] + 1e-3


# ------------------------------------------------------------------------------------------------------------ the choice
def taken(model: HtcVlmForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, path: str = "auto") -> str:
    """Which path `compress` really took."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        real = fast_prefill.compress
        patch.setattr(fast_prefill, "compress", lambda *args: calls.append("fast") or real(*args))  # type: ignore[func-returns-value]
        model.compress(pixel_values=pixels(2), path=path)
    return calls[0] if calls else "general"


def test_it_is_taken_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after somebody looked at hidden states: transformers leaves idle hooks behind."""
    model = build(VOCO)
    assert taken(model, monkeypatch) == "fast"
    assert taken(model, monkeypatch, "general") == "general"
    assert taken(shared({"name": "voco"}), monkeypatch) == "general"  # causal
    model.bottleneck_attention(pixel_values=pixels(1))
    model(**batch([[4, 5]]), output_hidden_states=True, output_attentions=False)
    assert model.model.language_model.layers[0]._forward_hooks
    assert taken(model, monkeypatch) == "fast"


def test_where_it_does_not_apply_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent fallback would be timed as the fast path; a silent fast path would give wrong kv."""

    def refused(model: HtcVlmForConditionalGeneration, why: str) -> None:
        assert taken(model, monkeypatch) == "general"
        with pytest.raises(ValueError, match=f"path='fast' cannot be taken: .*{why}.*path='general'"):
            model.compress(pixel_values=pixels(2), path="fast")

    refused(shared({"name": "voco"}), "visual_attention is 'causal'")
    refused(model_with(decoder(GraniteConfig)), "the language model is a GraniteModel; known: LlamaModel")
    with pytest.raises(ValueError, match=f"a sliding window of {N_PATCHES}"):  # on neither path, see movable.py
        model_with(decoder(MistralConfig, sliding_window=N_PATCHES)).compress(pixel_values=pixels(2))
    dropping = model_with(decoder(attention_dropout=0.5))
    assert taken(dropping, monkeypatch) == "fast"
    refused(dropping.train(), "attention dropout 0.5")
    hooked = build(VOCO)
    hook = hooked.model.language_model.layers[1].register_forward_pre_hook(lambda module, args: None)
    refused(hooked, "hooked to layer 1")
    hook.remove()
    assert taken(hooked, monkeypatch) == "fast"

    class Changed(type(hooked.model.language_model.layers[2])):  # type: ignore[misc]
        pass

    hooked.model.language_model.layers[2].__class__ = Changed
    refused(hooked, "layer 2 is a Changed")


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path is 'quick'; known: auto, fast, general"):
        shared(VOCO).compress(pixel_values=pixels(1), path="quick")


# ---------------------------------------------------------------------------------------------------------- what it costs
@pytest.mark.parametrize("n_layers", [1, 2, 5])
@pytest.mark.parametrize(("n_bottleneck", "n_kv_heads"), [(1, 4), (3, 2)])
def test_it_costs_what_is_promised_and_nothing_else(n_bottleneck: int, n_kv_heads: int, n_layers: int) -> None:
    """Queries of visual rows, or a last layer for them, would still give the right kv. Counted by torch."""
    model = model_with(decoder(num_hidden_layers=n_layers, num_key_value_heads=n_kv_heads), n_bottleneck)
    visual = visual_tokens(model)
    counted = cost.count_flops(lambda: model.model.compress_visual(visual, path="fast"))
    shape = cost.DecoderShape.from_config(model.config.text_config)
    assert counted == 3 * cost.fast_compress_flops(shape, N_VISUAL, n_bottleneck)


def seven_b(n_bottleneck: int = 1) -> HtcVlmForConditionalGeneration:
    """LLaVA-1.5-7B's decoder without weights."""
    shape = cost.LLAMA_7B
    text = LlamaConfig(
        vocab_size=shape.n_vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads, num_key_value_heads=shape.n_kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        return model_with(text, n_bottleneck)


def test_it_never_waits_for_the_device() -> None:
    """A `.item()` or a branch on a tensor makes the GPU idle in each layer. The meta device has no values to wait for."""
    model = seven_b()
    visual = torch.empty(8, 580, 4096, device="meta")
    flops = cost.count_flops(lambda: model.model.compress_visual(visual, path="fast"))
    assert flops == 8 * cost.fast_compress_flops(cost.LLAMA_7B, 580)
    assert model.model.compress_visual(visual).shape == (8, 32, 2, 32, 1, 128)


@pytest.mark.slow
def test_it_is_one_graph_for_the_compiler() -> None:
    """A graph break costs more than compiling gains."""
    model = model_with(decoder(), 3)
    expected, _ = both(model)
    compiled = torch.compile(model.model.compress_visual, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(visual_tokens(model), path="fast"), expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("n_bottleneck", [1, 3])
@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_bfloat16_on_a_gpu_is_no_worse_than_the_masked_pass(n_bottleneck: int, n_kv_heads: int) -> None:
    """Other attention and norm kernels than on the CPU; heads as wide as at 7B. No synchronisation while it runs."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "initializer_range": 0.03}
    model = model_with(decoder(num_key_value_heads=n_kv_heads, **sizes), n_bottleneck).cuda()
    _, exact = both(model)
    model.to(torch.bfloat16)
    fast, general = both(model, dtype=torch.bfloat16)
    errors = [(kv.float() - exact).abs().mean().item() for kv in (fast, general)]
    assert errors[0] < 1.5 * errors[1] + 1e-3
    visual = visual_tokens(model, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.model.compress_visual(visual, path="fast")
    finally:
        torch.cuda.set_sync_debug_mode("default")
