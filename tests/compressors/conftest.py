"""A tiny real LLaVA of transformers, three left-padded prompts about four images, and its layers run by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

N_PATCHES, N_LAYERS, N_BLOCKS = 16, 6, 4
IMAGE, PAD = 50, 0


def make_llava(attention: str = "sdpa", **changes: Any) -> LlavaForConditionalGeneration:
    """16 patches of 14 pixels, 4 blocks (3 before the features), 6 layers, 4 heads over 2 of keys; seeded weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        initializer_range=0.3,
    )
    options = {"vision_config": vision.to_dict(), "text_config": text.to_dict(), **changes}
    config = LlavaConfig(**options, image_token_index=IMAGE, image_seq_length=N_PATCHES)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    settle(model)
    return model


def settle(model: Any) -> None:
    """Generation that neither stops early nor utters a placeholder."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE]


@dataclass(frozen=True)
class Prompts:
    """samples[i] asks about pixels[i] (n, 3, 56, 56); `batch` is all of them, left-padded."""

    samples: list[Tensor]
    pixels: list[Tensor]
    batch: dict[str, Tensor]

    def one(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.samples[i][None], "pixel_values": self.pixels[i]}


def make_prompts() -> Prompts:
    image = [IMAGE] * N_PATCHES + [3]
    samples = [
        torch.tensor([1, 5, *image, 7, 8, 9]),
        torch.tensor([1, *image, *image, 11, 12]),
        torch.tensor([1, 4, 4, 4, 9, *image, 7, 8, 9, 10, 20, 21]),
    ]
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    longest = max(map(len, samples))
    ids = torch.stack([torch.cat((ids.new_full((longest - len(ids),), PAD), ids)) for ids in samples])
    is_real = torch.stack([torch.arange(longest) >= longest - len(ids) for ids in samples]).long()
    return Prompts(
        samples=samples,
        pixels=[pixels[:1], pixels[1:3], pixels[3:]],
        batch={"input_ids": ids, "attention_mask": is_real, "pixel_values": pixels},
    )


def run_layer(model: Any, index: int, states: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """One eager layer by hand: states (1, N, D), position (N,) -> (1, N, D) and its attention (H, N, N)."""
    decoder = model.model.language_model
    layer, n = decoder.layers[index], states.shape[1]
    future = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    attended, weights = layer.self_attn(
        hidden_states=layer.input_layernorm(states),
        position_embeddings=decoder.rotary_emb(states, position_ids=position[None]),
        attention_mask=future,
    )
    states = states + attended
    return states + layer.mlp(layer.post_attention_layernorm(states)), weights[0]


def embed(model: Any, ids: Tensor, pixels: Tensor) -> Tensor:
    """(L,) ids with the placeholders of all images -> (1, L, D), what stock LLaVA gives layer 0."""
    embeds = model.get_input_embeddings()(ids[None]).clone()
    embeds[0, ids == IMAGE] = torch.cat(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
    return embeds


def finish(model: Any, states: Tensor) -> Tensor:
    """(1, N, D) after the last layer -> (vocabulary,) logits of the last token."""
    return model.lm_head(model.model.language_model.norm(states))[0, -1]


@pytest.fixture(scope="session")
def llavas() -> dict[str, LlavaForConditionalGeneration]:
    return {attention: make_llava(attention) for attention in ("sdpa", "eager")}


@pytest.fixture(scope="session")
def llava(llavas: dict[str, LlavaForConditionalGeneration]) -> LlavaForConditionalGeneration:
    return llavas["eager"]


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return make_prompts()


@dataclass(frozen=True)
class ByHand:
    """The pieces for a reference of one sample, without a cache, a batch or our code."""

    run_layer: Callable[..., tuple[Tensor, Tensor]] = run_layer
    embed: Callable[..., Tensor] = embed
    finish: Callable[..., Tensor] = finish
    is_image: Callable[[Tensor], Tensor] = staticmethod(lambda ids: ids == IMAGE)


@pytest.fixture(scope="session")
def by_hand() -> ByHand:
    return ByHand()


@pytest.fixture(scope="session")
def new_llava() -> Callable[..., LlavaForConditionalGeneration]:
    return make_llava


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield
