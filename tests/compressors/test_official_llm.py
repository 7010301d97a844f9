"""FastV, PyramidDrop, SparseVLM and SparseVLM+ against outputs recorded from their released code: selections and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import htc_vlm
from htc_vlm.compressors import sparse_vlm
from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration
from htc_vlm.ops import cluster

GOLDEN = Path(__file__).parents[1] / "golden" / "official"
TOLERANCE = 2e-4
SMALL = ("fastv_small", "pdrop_small", "pdrop_batch", "svlm_small")
PUBLISHED = ("fastv_pub64", "pdrop_pub64", "svlm_pub64", "splus_pub64")  # 32 layers, 576 patches


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def model_of(s: dict[str, Any], golden: dict[str, Tensor], texts: Tensor) -> HtcVlmForConditionalGeneration:
    """A LLaVA whose language model has the recorded weights, and whose ids from s["vocab"] on embed the rows of `texts`."""
    n_ids = s["vocab"] + len(texts) + 1  # the last one is <image>
    text = LlamaConfig(
        vocab_size=n_ids, hidden_size=s["hidden"], intermediate_size=s["inter"], num_hidden_layers=s["n_layers"],
        num_attention_heads=s["n_heads"], num_key_value_heads=s["n_kv"], pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    side = round(s["n_patches"] ** 0.5)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=2 * side, patch_size=2
    )
    model = HtcVlmForConditionalGeneration(
        HtcVlmConfig(
            vision_config=vision, text_config=text, image_token_index=n_ids - 1, image_seq_length=s["n_patches"],
            vision_feature_layer=-1, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    decoder = model.model.language_model
    with torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            for name, weight in layer.named_parameters():
                weight.copy_(golden[f"weights.l{index % s['n_sets']}.{name.split('.')[-2]}"])
        decoder.norm.weight.copy_(golden["weights.norm"])
        decoder.embed_tokens.weight[: s["vocab"]] = golden["weights.embed"].float()
        decoder.embed_tokens.weight[s["vocab"] : n_ids - 1] = texts
        model.lm_head.weight.zero_()
        model.lm_head.weight[: s["vocab"]] = golden["weights.head"].float()
    return model


def settings_of(s: dict[str, Any]) -> dict[str, Any]:
    if s["method"] == "fastv":
        return {"n_keep": s["n_keep"], "layer": s["layer"]}
    if s["method"] == "pyramid_drop":
        return {"stages": tuple(s["stages"]), "ratio": s["ratio"]}
    given = {name: s[name] for name in ("budget", "keep", "plus") if name in s}
    return given | ({"keep": tuple(s["keep"]), "layers": (2, 6, 15)} if "keep" in s else {})


def official_patches(s: dict[str, Any], golden: dict[str, Tensor], sample: int) -> dict[int, list[int | None]]:
    """{layer: the patch of each visual token that enters it, None for a merged one}; `kept` counts in the sequence before."""
    n_all = len(golden[f"input.{sample}"])
    patch_of: list[int | None] = [i - s["n_pre"] if s["n_pre"] <= i < s["n_pre"] + s["n_patches"] else -1 for i in range(n_all)]
    found = {}
    for layer in sorted(int(name.split(".")[1]) for name in golden if name.startswith("kept.") and name.endswith(f".{sample}")):
        kept = golden[f"kept.{layer}.{sample}"].tolist()
        while s["batch"] > 1 and kept[-1] == -1:  # padding
            kept.pop()
        patch_of = [None if column == -1 else patch_of[column] for column in kept]
        found[layer] = [patch for patch in patch_of if patch != -1]
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)])
def test_selections_and_logits_are_those_of_the_released_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token kept in another's place, a position off by one or a softmax over other rows would still look like the method."""
    s, golden = read(name)
    inputs = [golden[f"input.{i}"].float() for i in range(s["batch"])]
    is_patch = [(torch.arange(len(x)) >= s["n_pre"]) & (torch.arange(len(x)) < s["n_pre"] + s["n_patches"]) for x in inputs]
    texts = torch.cat([x[~here] for x, here in zip(inputs, is_patch, strict=True)])
    model = model_of(s, golden, texts)
    image_id, n_used, rows = model.config.image_token_id, s["vocab"], []
    for here in is_patch:
        ids = torch.full((len(here),), image_id)
        n_words = int((~here).sum())
        ids[~here] = torch.arange(n_used, n_used + n_words)
        n_used += n_words
        rows.append(ids)
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    patches = [x[here] for x, here in zip(inputs, is_patch, strict=True)]
    images = {"image": BaseModelOutputWithPooling(pooler_output=patches)}
    noises = iter([golden[key] for key in sorted(golden) if key.startswith("noise.")])
    monkeypatch.setattr(sparse_vlm, "density_noise", lambda *args, **kwargs: next(noises) * cluster.NOISE_SCALE)
    with htc_vlm.apply(model, s["method"], **settings_of(s)) as applied:
        out = model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=images, use_cache=True)
        sources = applied.sources
        decoded = []
        for token in s["decode_ids"] if "decode.0" in golden else []:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = model(
                input_ids=torch.full((s["batch"], 1), token), attention_mask=mask, past_key_values=out.past_key_values,
                use_cache=True,
            )  # fmt: skip
            decoded.append(step.logits[:, -1, : s["vocab"]])
    for sample in range(s["batch"]):
        for layer, patch_of in official_patches(s, golden, sample).items():
            ours = sources[layer][sample]
            assert len(ours) == len(patch_of)
            single = [i for i, patch in enumerate(patch_of) if patch is not None]
            assert ours[single].argmax(-1).tolist() == [patch_of[i] for i in single]
            assert ours[single].amax(-1).tolist() == [1.0] * len(single)
    n_last = golden["logits"].shape[1] if s["batch"] == 1 else s["n_post"]
    for sample in range(s["batch"]):
        n_real = int((golden["positions.4"][sample] != 0).sum()) + 1 if s["batch"] > 1 else golden["logits"].shape[1]
        wanted = golden["logits"][sample, n_real - n_last : n_real]
        torch.testing.assert_close(out.logits[sample, -n_last:, : s["vocab"]], wanted, atol=TOLERANCE, rtol=0)
    for number, logits in enumerate(decoded):
        torch.testing.assert_close(logits, golden[f"decode.{number}"], atol=TOLERANCE, rtol=0)
