"""Decoders whose keys a rotation does not move are refused by name; the others give in two passes what they give in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    CohereConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    SmolLM3Config,
)

from htc_vlm import load
from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration
from htc_vlm.model.movable import check_decoder

from .. import tinies
from ..tinies import BOTTLENECK, IMAGE, N_PATCHES

BASE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
WORDS = list(range(5, 15))


def model_with(text: Any, name: str = "voco") -> HtcVlmForConditionalGeneration:
    torch.manual_seed(0)
    config = HtcVlmConfig(
        vision_config=tinies.vision_config(), text_config=text, image_token_index=IMAGE, bottleneck_token_id=BOTTLENECK,
        compressor={"name": name}, image_seq_length=N_PATCHES, tie_word_embeddings=False,
    )  # fmt: skip
    return HtcVlmForConditionalGeneration(config).eval()


REFUSED = {
    "cohere": (CohereConfig(**BASE), "CohereAttention rotates other pairs of numbers .interleaved."),
    "dynamic": (
        LlamaConfig(**BASE, max_position_embeddings=16, rope_parameters=DYNAMIC),
        "rotary kind is 'dynamic', whose frequencies change past 16 positions, and 17 are needed",
    ),
    "window": (MistralConfig(**BASE, sliding_window=8), "sliding window of 8, and 17 positions are needed"),
    "phi": (PhiConfig(**BASE), "rotates 8 of a head's 16 numbers"),
    "gemma3": (Gemma3TextConfig(**BASE, head_dim=16), "rotates its layers by several tables"),
    "smollm3": (SmolLM3Config(**BASE, no_rope_layers=[1, 0, 1]), "has layers that do not rotate"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_decoder_that_a_rotation_does_not_move_is_refused_by_name(name: str) -> None:
    """One pass and two disagreed by half the logits' size, silently."""
    text, message = REFUSED[name]
    model = model_with(text)
    with pytest.raises(ValueError, match=f"voco keeps images as keys and values that a rotation moves.*{message}"):
        check_decoder(model)
    with pytest.raises(ValueError, match=message):
        model.compress(pixel_values=tinies.pixels(1))
    if name != "phi":  # whose attention has no key of the general pass's mask to spare here
        with pytest.raises(ValueError, match="which this decoder's cannot be"):
            model(input_ids=torch.tensor([[*[IMAGE] * N_PATCHES, BOTTLENECK, *WORDS]]), pixel_values=tinies.pixels(1))


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Mpt", "GPTNeoX"])
def test_a_decoder_whose_parts_have_other_names_is_refused(kind: str) -> None:
    """AttributeErrors from the middle of the construction."""
    text = getattr(transformers, f"{kind}Config")(vocab_size=40, num_hidden_layers=1, hidden_size=64, num_attention_heads=4)
    with pytest.raises(ValueError, match=f"voco needs a decoder built as Llama's.*; {kind}Model is not"):
        model_with(text)


def test_loading_refuses_it_before_anything_is_asked(tmp_path: Any) -> None:
    """And the same checkpoint without a bottleneck loads."""
    tokenizer = tinies.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<voco>"]}, replace_extra_special_tokens=False)
    from htc_vlm.model import HtcVlmProcessor

    for name in ("voco", "none"):
        model = model_with(CohereConfig(**BASE), name)
        model.save_pretrained(tmp_path / name)
        HtcVlmProcessor.for_config(model.config, tinies.image_processor(), tokenizer).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="interleaved"):
        load(tmp_path / "voco")
    with pytest.raises(ValueError, match="interleaved"):
        load(tmp_path / "none", compressor={"name": "voco"})
    assert load(tmp_path / "none")[0].model.compressor.name == "none"


@pytest.mark.parametrize(
    "text",
    [
        MistralConfig(**BASE, sliding_window=64), Qwen2Config(**BASE), MistralConfig(**BASE, sliding_window=None),
        LlamaConfig(**BASE, max_position_embeddings=64, rope_parameters=DYNAMIC),
        LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        LlamaConfig(
            **BASE, max_position_embeddings=64,
            rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
        ),
    ],
    ids=["window", "qwen2", "mistral", "dynamic", "linear", "yarn"],
)  # fmt: skip
@torch.no_grad()
def test_within_window_and_context_two_passes_are_one(text: Any) -> None:
    """What is not refused is right: text before and after the image."""
    model, images = model_with(text), tinies.pixels(1)
    one = model(input_ids=torch.tensor([[4, *[IMAGE] * N_PATCHES, BOTTLENECK, *WORDS]]), pixel_values=images).logits
    two = model(input_ids=torch.tensor([[4, BOTTLENECK, *WORDS]]), compressed=model.compress(pixel_values=images)).logits
    torch.testing.assert_close(one[0, -len(WORDS) :], two[0, -len(WORDS) :], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "text",
    [MistralConfig(**BASE, sliding_window=20), LlamaConfig(**BASE, max_position_embeddings=20, rope_parameters=DYNAMIC)],
    ids=["window", "dynamic"],
)  # fmt: skip
def test_a_prompt_past_window_or_context_is_refused(text: Any) -> None:
    """The image fits, the question after it does not."""
    model = model_with(text)
    kept = model.compress(pixel_values=tinies.pixels(1))
    assert model(input_ids=torch.tensor([[5, 6, 7]]), compressed=kept).logits.isfinite().all()
    with pytest.raises(ValueError, match="20.*27 (positions )?are needed"):
        model(input_ids=torch.tensor([WORDS]), compressed=kept)
