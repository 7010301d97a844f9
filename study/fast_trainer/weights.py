"""The fast model's weights and the library's: which is which, from a checkpoint and back to one.

Source:  ours.
Differs: nothing known. The frozen tower and the quantizer stay as they are in the checkpoint that a run starts from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from htc_vlm.model import adapter
from htc_vlm.train.saving import save_rounded
from study.fast_trainer.model import FastModel, Method, Shape, method_of

LLAMA = "model.language_model."
PROJECTOR = "model.multi_modal_projector.linear_"
COMPRESSOR = "model.compressor."


class Place(NamedTuple):
    """Some rows of a weight of the fast model are a weight of the library's."""

    fast: str
    library: str
    rows: slice = slice(None)


def places(shape: Shape, method: Method, has_lora: bool = False) -> list[Place]:
    """Where every trained weight stands in both; has_lora: the library's model carries an adapter."""
    found = [Place("embedding", f"{LLAMA}embed_tokens.weight"), Place("norm", f"{LLAMA}norm.weight")]
    n_q, n_kv, n_mlp = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim, shape.mlp_width
    parts = {
        "self_attn.q_proj": ("qkv", slice(0, n_q)),
        "self_attn.k_proj": ("qkv", slice(n_q, n_q + n_kv)),
        "self_attn.v_proj": ("qkv", slice(n_q + n_kv, None)),
        "self_attn.o_proj": ("out", slice(None)),
        "mlp.gate_proj": ("gate_up", slice(0, n_mlp)),
        "mlp.up_proj": ("gate_up", slice(n_mlp, None)),
        "mlp.down_proj": ("down", slice(None)),
        "input_layernorm": ("attention_norm", slice(None)),
        "post_attention_layernorm": ("mlp_norm", slice(None)),
    }
    for number in range(shape.n_layers):
        for library, (fast, rows) in parts.items():
            there = f"{LLAMA}layers.{number}.{library}"
            is_matrix = has_lora and library.endswith("_proj")
            found.append(Place(f"layers.{number}.{fast}", f"{there}{'.base_layer' if is_matrix else ''}.weight", rows))
            if is_matrix:
                mine = f"lora.{number}.{library.split('.')[1]}"
                found += [Place(f"{mine}_{p.lower()}", f"{there}.lora_{p}.{adapter.NAME}.weight") for p in "AB"]
    for number in (1, 2):
        found += [Place(f"project_{number}.{part}", f"{PROJECTOR}{number}.{part}") for part in ("weight", "bias")]
        if method.has_anchors:
            found.append(Place(f"anchors_{number}.weight", f"{COMPRESSOR}to_anchors.w{number}.weight"))
    if method.own_rows:
        found.append(Place("rows", f"{COMPRESSOR}embedding"))
    if method.n_looks > 1:
        found.append(Place("look_again", f"{COMPRESSOR}look_again.weight"))
    return found


def shape_of(model: Any) -> Shape:
    """Sizes of a library model; ValueError for one that is no tiny Llama behind a projector of two layers."""
    config, text = model.config, model.config.text_config
    plain = text.model_type == "llama" and not text.attention_bias and not text.mlp_bias and text.tie_word_embeddings
    rope = text.rope_parameters
    if not plain or rope["rope_type"] != "default" or config.projector_hidden_act != "gelu" or text.hidden_act != "silu":
        raise ValueError("the fast trainer knows plain Llamas with tied embeddings (as the preset tiny); use htc-vlm train")
    anchors = getattr(model.model.compressor, "to_anchors", None)
    code_width, anchor_width = (0, 0) if anchors is None else (anchors.w1.in_features, anchors.w1.out_features)
    return Shape(
        width=text.hidden_size, mlp_width=text.intermediate_size, n_layers=text.num_hidden_layers,
        n_heads=text.num_attention_heads, n_kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads, n_words=text.vocab_size, eps=text.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]), feature_width=model.model.multi_modal_projector.linear_1.in_features,
        bottleneck_id=config.bottleneck_token_id, code_width=code_width, anchor_width=anchor_width,
    )  # fmt: skip


def fast_model(model: Any, reads_turn: bool = False, seed: int = 0) -> FastModel:
    """A library model's weights as a fast model; the head for turns, which the library lacks, is drawn by the seed."""
    shape, method = shape_of(model), method_of(model.config.compressor)
    if reads_turn and method.n_pooled:
        raise ValueError("turn_loss reads the turn of a thing off its patches, and avg_pool hands none on; set turn_loss: 0")
    lora = None
    if (about := getattr(model, "adapter", None)) is not None:
        lora = (about["lora"]["rank"], about["lora"]["alpha"] / about["lora"]["rank"])
    torch.manual_seed(seed)
    made = FastModel(shape, method, reads_turn, lora)
    mine, theirs = made.state_dict(), model.state_dict()
    for place in places(shape, method, lora is not None):
        mine[place.fast][place.rows] = theirs[place.library]
    return made


def library_weights(model: FastModel) -> dict[str, Tensor]:
    """The trained weights under the library's names."""
    mine = model.state_dict()
    found = places(model.shape, model.method, model.lora is not None)
    return {place.library: mine[place.fast][place.rows] for place in found}


def export(model: FastModel, library: Any, processor: Any, folder: Path) -> None:
    """Write a checkpoint folder: `library` (what the run started from) with the trained weights, rounded to bfloat16; of a run
    with an adapter the folder of that alone."""
    own = library.state_dict()
    for name, value in library_weights(model).items():
        own[name].copy_(value)
    if model.lora is not None:
        adapter.save(library, folder)
    else:
        save_rounded(library, processor, folder)
