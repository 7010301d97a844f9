"""LLaVA-Mini against outputs recorded from its released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration

GOLDEN = Path(__file__).parents[1] / "golden" / "official"
TOLERANCE = 2e-4


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def model_of(settings: dict[str, Any], tensors: dict[str, Tensor], attention: str) -> HtcVlmForConditionalGeneration:
    llm = settings["llm"]
    text = LlamaConfig(
        vocab_size=40, hidden_size=llm["hidden"], intermediate_size=llm["inter"], num_hidden_layers=2,
        num_attention_heads=llm["n_heads"], num_key_value_heads=llm["n_kv"], rms_norm_eps=llm["rms_norm_eps"],
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    compressor = {
        "name": "llava_mini", "n_tokens": settings["n_tokens"], "n_fusion": settings["n_fusion"],
        "n_heads": settings["compressor_heads"],
    }  # fmt: skip
    config = HtcVlmConfig(
        vision_config=vision, text_config=text, image_token_index=settings["image_id"], compressor=compressor,
        image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attention
    model = HtcVlmForConditionalGeneration(config).eval()
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    state = {_place(name): value for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "compressor" in name or "projector" in name]
    return model


def _place(name: str) -> str:
    return f"model.language_model.{name}" if name.startswith("embed_tokens") else f"model.{name}"


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mini_c1_bos", "mini_c1_first", "mini_c4_answers", "mini_c4_first"])
def test_the_language_model_gets_what_the_released_code_gives_it(name: str, attention: str) -> None:
    """Words before the image (BOS, a system prompt) read it too: all words come after [patches; tokens] in pre-fusion."""
    settings, golden = read(name)
    model = model_of(settings, golden, attention)
    method: Any = model.model.compressor
    torch.testing.assert_close(method.compress(golden["features"]), golden["compressed"], atol=TOLERANCE, rtol=0)
    one_image = [settings["image_id"]] * settings["n_tokens"]
    rows = [[i for token in row for i in (one_image if token == settings["image_id"] else [token])] for row in settings["rows"]]
    flags = settings["answers"] or [[0] * len(row) for row in settings["rows"]]
    n_each = [[len(one_image) if token == settings["image_id"] else 1 for token in row] for row in settings["rows"]]
    is_answer = [
        [bool(flag) for flag, n in zip(marks, counts, strict=True) for _ in range(n)]
        for marks, counts in zip(flags, n_each, strict=True)
    ]
    seen: list[Tensor] = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.tensor(rows)
    model(
        input_ids=ids, attention_mask=torch.ones_like(ids), patch_features=golden["features"], is_answer=torch.tensor(is_answer)
    )
    torch.testing.assert_close(seen[0], golden["llm_inputs"], atol=TOLERANCE, rtol=0)
