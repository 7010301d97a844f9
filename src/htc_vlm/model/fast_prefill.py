"""The fast compress path: the masked pass [visual; bottleneck] without what nobody reads. Inference only, exact.

Where visual tokens attend only to themselves (`visual_attention: self`), the attention output of a visual token is its own
value, so it needs no query, no scores and no softmax, and the images of a batch are one stream of rows without padding.
Only the bottleneck rows attend. The kv are the bottleneck's keys and values of each layer, so that, of n layers,

    layers 1 to n - 2   visual rows: key, value, output projection, MLP; bottleneck rows: the query besides
    layer n - 1         visual rows: key and value only, for the bottleneck to look at
    layer n             bottleneck rows: key and value; nothing of the visual rows

Source:  HTC-VLM Eq. 6 and Algorithm 1; transformers 5.23 for the decoder layers (Llama, Mistral, Qwen2, Qwen3 and those of
         Qwen2.5-VL and Qwen3-VL).
Differs: the paper computes the masked pass densely. Sums are taken in another order, so results differ by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from htc_vlm.compressors import Compressor
from htc_vlm.compressors.voco import Bottleneck
from htc_vlm.ops import rope

PATHS = ("auto", "fast", "general")
MAX_ROWS = 32768  # rows of one chunk: at 7B in bf16 about 5 GB of intermediate values, and past where products get faster
KNOWN_MODELS = (
    llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model, qwen2_5_vl.Qwen2_5_VLTextModel, qwen3.Qwen3Model,
    qwen3_vl.Qwen3VLTextModel,
)  # fmt: skip
KNOWN_LAYERS = (
    llama.LlamaDecoderLayer, mistral.MistralDecoderLayer, qwen2.Qwen2DecoderLayer, qwen2_5_vl.Qwen2_5_VLDecoderLayer,
    qwen3.Qwen3DecoderLayer, qwen3_vl.Qwen3VLTextDecoderLayer,
)  # fmt: skip
KNOWN_ATTENTION = (
    llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention, qwen2_5_vl.Qwen2_5_VLAttention,
    qwen3.Qwen3Attention, qwen3_vl.Qwen3VLTextAttention,
)  # fmt: skip
KNOWN_NORMS = (
    llama.LlamaRMSNorm, mistral.MistralRMSNorm, qwen2.Qwen2RMSNorm, qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen3.Qwen3RMSNorm,
    qwen3_vl.Qwen3VLTextRMSNorm,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ does it apply?
def takes_fast_path(path: str, language_model: nn.Module, compressor: Compressor, n_rows: int) -> bool:
    """Decide between the fast and the general path. ValueError for path="fast" where it does not apply, saying why."""
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; known: {', '.join(PATHS)}")
    if path == "general":
        return False
    reason = why_not(language_model, compressor, n_rows)
    if reason is not None and path == "fast":
        raise ValueError(f"path='fast' cannot be taken: {reason}; use path='auto' or path='general'")
    return reason is None


def why_not(language_model: Any, compressor: Compressor, n_rows: int) -> str | None:
    """Why this model's masked pass is not what the fast path computes; None where it is. n_rows: C + K of one image."""
    if not isinstance(compressor, Bottleneck) or type(compressor).visible is not Bottleneck.visible:
        return f"compressor {compressor.name!r} has no bottleneck mask, or one of its own"
    if compressor.settings.visual_attention != "self":
        return f"visual_attention is {compressor.settings.visual_attention!r}; the fast path needs 'self'"
    if type(language_model) not in KNOWN_MODELS:
        return f"the language model is a {type(language_model).__name__}; known: {_names(KNOWN_MODELS)}"
    for i, layer in enumerate(layers_of(language_model)):
        attention = layer.self_attn
        if type(layer) not in KNOWN_LAYERS or type(attention) not in KNOWN_ATTENTION:
            return (
                f"layer {i} is a {type(layer).__name__} with a {type(attention).__name__}; known: {_names(KNOWN_LAYERS)}"
            )
        if _is_intercepted(layer) or _is_intercepted(attention):
            return f"something is hooked to layer {i}, which the fast path does not call as a whole"
        if attention.training and attention.attention_dropout:
            return f"the model is in training mode with attention dropout {attention.attention_dropout}; call eval()"
    window = getattr(language_model.config, "sliding_window", None)
    if window is not None and n_rows > window:
        return f"an image is {n_rows} tokens, attention is limited to a sliding window of {window}"
    return None


def _names(classes: tuple[type, ...]) -> str:
    return ", ".join(one.__name__ for one in classes)


def _is_intercepted(module: nn.Module) -> bool:
    """Would somebody notice that `module` itself is never called? transformers' own hooks are idle outside its forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)


def layers_of(language_model: Any) -> list[Any]:
    """The decoder layers that a forward pass runs."""
    return list(language_model.layers[: language_model.config.num_hidden_layers])


# --------------------------------------------------------------------------------------------------------- the fast path
@dataclass(frozen=True)
class Turn:
    """Rotary positions of one image's rows. cos, sin (1, L, 1, head_dim)."""

    cos: Tensor
    sin: Tensor

    def last(self, n: int) -> Turn:
        return Turn(self.cos[:, -n:], self.sin[:, -n:])

    def __call__(self, heads: Tensor) -> Tensor:
        """(B, L, heads, head_dim), as transformers' apply_rotary_pos_emb."""
        return heads * self.cos + llama.rotate_half(heads) * self.sin


def compress(
    language_model: Any, visual: Tensor, bottleneck: Tensor, positions: Tensor | None = None, deep: Tensor | None = None
) -> Tensor:
    """(N, C, D) visual tokens and (K, D) bottleneck embeddings -> kv (N, layers, 2, kv heads, K, head_dim).

    positions (axes, C): of the visual tokens, with the bottleneck at 0; None: counted up to -1. deep (n, N, C, D): what the
    first n layers add to the visual tokens.
    Call it only where `why_not` is None, without gradients. Images go in chunks of at most MAX_ROWS rows. Nothing here
    waits for the device.
    """
    n_bottleneck = bottleneck.shape[0]
    n_rows = visual.shape[1] + n_bottleneck
    turn = _turn(language_model, visual, n_bottleneck, positions)
    layers = layers_of(language_model)
    return torch.cat([_compress_chunk(layers, *chunk, bottleneck, turn) for chunk in chunks(visual, deep, n_rows)])


def chunks(visual: Tensor, deep: Tensor | None, n_rows: int) -> list[tuple[Tensor, Tensor | None]]:
    """Images of n_rows rows each, in parts of at most MAX_ROWS rows."""
    n_images = max(1, MAX_ROWS // n_rows)
    parts = visual.split(n_images)
    return list(zip(parts, [None] * len(parts) if deep is None else deep.split(n_images, dim=1), strict=True))


def visual_kv(
    language_model: Any, visual: Tensor, positions: Tensor | None = None, deep: Tensor | None = None
) -> Tensor:
    """(N, C, D) visual tokens that attend only to themselves -> (N, layers, 2, kv heads, C, head_dim), without bottleneck.

    positions (axes, C), None: the last visual token stands at -1. Under the same conditions as `compress`.
    """
    n_visual = visual.shape[1]
    turn = _turn(language_model, visual, 0, positions)
    states, kv, layers = visual, [], layers_of(language_model)
    for i, layer in enumerate(layers):
        key, value = _keys_values(layer, states, turn)
        kv.append(_cell(key, value, n_visual))
        if layer is not layers[-1]:
            own = value[:, :, :, None].expand(-1, -1, -1, layer.self_attn.num_key_value_groups, -1)
            states = states + layer.self_attn.o_proj(own.flatten(2))
            states = states + layer.mlp(_normed(layer.post_attention_layernorm, states))
            _add_deep(states, deep, i)
    return torch.stack(kv, dim=1)


def _turn(language_model: Any, visual: Tensor, n_bottleneck: int, positions: Tensor | None) -> Turn:
    ids = rope.around_image(visual.shape[1], n_bottleneck, positions, visual.device)
    cos, sin = language_model.rotary_emb(visual, position_ids=rope.for_rows(ids, 1))
    return Turn(cos[:, :, None], sin[:, :, None])


def _add_deep(states: Tensor, deep: Tensor | None, layer: int) -> None:
    """Write what is added behind this layer to the visual rows, which come first."""
    if deep is not None and layer < len(deep):
        states[:, : deep.shape[2]] += deep[layer]


def _compress_chunk(layers: list[Any], visual: Tensor, deep: Tensor | None, bottleneck: Tensor, turn: Turn) -> Tensor:
    n_bottleneck = bottleneck.shape[0]
    states = torch.cat((visual, bottleneck.expand(visual.shape[0], -1, -1)), dim=1)  # (N, L, D), ours to write to
    seen = _seen(n_bottleneck, states.shape[1], layers[0].self_attn.num_key_value_groups, states.device)
    kv = []
    for i, layer in enumerate(layers[:-2]):
        states, cell = _layer(layer, states, n_bottleneck, turn, seen)
        _add_deep(states, deep, i)
        kv.append(cell)
    for layer in layers[-2:-1]:
        states, cell = _layer(layer, states, n_bottleneck, turn, seen, only_bottleneck=True)
        kv.append(cell)
    key, value = _keys_values(layers[-1], states[:, -n_bottleneck:], turn.last(n_bottleneck))
    kv.append(_cell(key, value, n_bottleneck))
    return torch.stack(kv, dim=1)


def _seen(n_bottleneck: int, n_rows: int, n_groups: int, device: torch.device) -> Tensor | None:
    """(n_groups * K, L) bool: a bottleneck token sees all visual rows and the bottleneck up to itself; None: all."""
    if n_bottleneck == 1:
        return None
    every = torch.ones(n_bottleneck, n_rows, dtype=torch.bool, device=device)
    return every.tril(n_rows - n_bottleneck).repeat(n_groups, 1)


def _layer(
    layer: Any, states: Tensor, n_bottleneck: int, turn: Turn, seen: Tensor | None, only_bottleneck: bool = False
) -> tuple[Tensor, Tensor]:
    """One decoder layer. states (N, L, D), written to -> those that go on, and the cell (N, 2, kv heads, K, head_dim)."""
    attention = layer.self_attn
    normed = _normed(layer.input_layernorm, states)
    key, value = _project(attention, normed, turn)
    cell = _cell(key, value, n_bottleneck)
    query = _heads(attention.q_proj(normed[:, -n_bottleneck:]), attention, "q_norm")
    mixed = _attend(turn.last(n_bottleneck)(query), key, value, attention, seen)  # (N, K, H * head_dim)
    if only_bottleneck:
        states = states[:, -n_bottleneck:]
    else:
        own = value[:, :, :, None].expand(-1, -1, -1, attention.num_key_value_groups, -1)  # each head, its group's value
        rows = own.reshape(*value.shape[:2], -1)  # a view of `value` where every head has its own
        rows[:, -n_bottleneck:] = mixed
        mixed = rows
    states += attention.o_proj(mixed)
    states += layer.mlp(_normed(layer.post_attention_layernorm, states))
    return states, cell


def _keys_values(layer: Any, states: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    return _project(layer.self_attn, _normed(layer.input_layernorm, states), turn)


def _project(attention: Any, normed: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """(N, L, D) -> rotated keys and values, (N, L, kv heads, head_dim) each."""
    key = turn(_heads(attention.k_proj(normed), attention, "k_norm"))
    return key, _heads(attention.v_proj(normed), attention)


def _heads(rows: Tensor, attention: Any, norm: str = "") -> Tensor:
    """(N, L, H * head_dim) -> (N, L, H, head_dim), normalised where the attention has such a norm (Qwen3)."""
    heads = rows.unflatten(-1, (-1, attention.head_dim))
    return _normed(getattr(attention, norm), heads) if norm and hasattr(attention, norm) else heads


def _normed(norm: Any, states: Tensor) -> Tensor:
    """RMSNorm in one kernel; transformers' takes six, and 32-bit copies of all rows."""
    if type(norm) not in KNOWN_NORMS or _is_intercepted(norm) or norm.weight.dtype != states.dtype:
        return norm(states)
    return rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _cell(key: Tensor, value: Tensor, n_bottleneck: int) -> Tensor:
    """A copy of the last rows: (N, 2, kv heads, K, head_dim)."""
    return torch.stack((key[:, -n_bottleneck:], value[:, -n_bottleneck:]), dim=1).transpose(2, 3)


def _attend(query: Tensor, key: Tensor, value: Tensor, attention: Any, seen: Tensor | None) -> Tensor:
    """query (N, K, H, head_dim), key and value (N, L, kv heads, head_dim) -> (N, K, H * head_dim).

    The heads of a group are further query rows of their key-value head, so that no key is repeated.
    """
    n_images, n_bottleneck = query.shape[:2]
    n_kv, n_groups = key.shape[2], attention.num_key_value_groups
    rows = query.unflatten(2, (n_kv, n_groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (N, kv heads, G * K, head_dim)
    out = scaled_dot_product_attention(
        rows, key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen, scale=attention.scaling
    )
    return out.unflatten(2, (n_groups, n_bottleneck)).permute(0, 3, 1, 2, 4).reshape(n_images, n_bottleneck, -1)
