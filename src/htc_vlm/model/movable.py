"""Can a decoder's cached keys be moved to another position by one rotation? Two passes equal one only where they can.

Source:  rotary embeddings (Su et al. 2021): R(p) k = R(p - q) R(q) k, for pairs (i, i + d/2) as in Llama.
Differs: what the equation does not hold for is refused by name, instead of answered wrongly: other pairs (Cohere), parts of a
         head (Phi), several tables (Gemma 3), none in some layers, frequencies that grow with the prompt (dynamic NTK and
         LongRoPE past their context), windows shorter than the prompt.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from htc_vlm.applied.families import family_of
from htc_vlm.compressors import Compressor
from htc_vlm.ops import rope

GROWING = ("dynamic", "longrope")  # kinds whose frequencies depend on how long the prompt is
PROBED_AT = 3
TOLERANCE = 1e-3

_KNOWN: dict[int, Limits] = {}  # by id, for torch.compile cannot follow a WeakKeyDictionary whose models have gone


@dataclass(frozen=True)
class Limits:
    """What stands in the way at any length (reason), and how far a decoder's keys can be moved."""

    reason: str | None
    window: int | None
    context: int | None
    rotary_kind: str


def check_movable(name: str, language_model: nn.Module, n_positions: int) -> None:
    """ValueError, naming what is in the way, unless this decoder's keys can be moved within n_positions."""
    limits = _KNOWN.get(id(language_model))
    if limits is None:
        limits = _limits(language_model)
        if not any(buffer.is_meta for buffer in language_model.buffers()):  # else not tried out yet
            _KNOWN[id(language_model)] = limits
            weakref.finalize(language_model, _KNOWN.pop, id(language_model), None)
    reason = limits.reason
    if reason is None and limits.window is not None and n_positions > limits.window:
        reason = f"its attention has a sliding window of {limits.window}, and {n_positions} positions are needed"
    elif reason is None and limits.context is not None and n_positions > limits.context:
        reason = (
            f"its rotary kind is {limits.rotary_kind!r}, whose frequencies change past {limits.context} positions, and "
            f"{n_positions} are needed"
        )
    if reason is not None:
        raise ValueError(
            f"{name} keeps images as keys and values that a rotation moves, which this decoder's cannot be: {reason}. "
            "Decoders like Llama, Mistral and Qwen2 can, up to their context and window; or use a method without a bottleneck"
        )


def check_context(config: Any, n_positions: int) -> None:
    """ValueError for a cached beginning of a prompt that n_positions make turn at other frequencies than it was read at."""
    kind, context = _growth(config.to_dict())
    if context is not None and n_positions > context:
        raise ValueError(
            f"this decoder's rotary kind is {kind!r}, whose frequencies change past {context} positions, and the prompts need "
            f"{n_positions}: the images were cached at others; ask less, keep fewer tokens, or give model.generate the pictures"
        )


def check_built_as_llama(name: str, language_model: Any) -> None:
    """ValueError for a decoder whose parts have other names, in which no bottleneck's keys are found."""
    if not hasattr(language_model, "embed_tokens"):
        raise ValueError(
            f"{name} needs a decoder built as Llama's, Mistral's or Qwen2's; {type(language_model).__name__} is not (it has no "
            "embed_tokens); use a method without a bottleneck"
        )


def check_decoder(model: Any) -> None:
    """`check_movable` of a whole model, for one image (of one token, where sizes differ): what a loaded checkpoint must pass.
    Methods without a bottleneck do."""
    compressor: Compressor = model.model.compressor
    if compressor.n_bottleneck:
        family = family_of(model)
        n_positions = compressor.n_visual(family.n_patches or 1) + compressor.n_bottleneck
        check_movable(compressor.name, family.decoder, n_positions)


def _limits(language_model: Any) -> Limits:
    settings: dict[str, Any] = language_model.config.to_dict()
    kind, context = _growth(settings)
    return Limits(_why_not_at_all(language_model, settings), _window(settings), context, kind)


def _growth(settings: dict[str, Any]) -> tuple[str, int | None]:
    """(rotary kind, positions past which its frequencies change; None: they never do)."""
    rotary = settings.get("rope_parameters") or {}
    kind = str(rotary.get("rope_type"))
    if kind not in GROWING:
        return kind, None
    return kind, int(rotary.get("original_max_position_embeddings") or settings["max_position_embeddings"])


def _why_not_at_all(language_model: Any, settings: dict[str, Any]) -> str | None:
    kind = type(language_model).__name__
    rotary = next((child for name, child in language_model.named_children() if name == "rotary_emb"), None)
    if rotary is None:
        return f"{kind} has no rotary position embedding"
    buffers = dict(rotary.named_buffers())
    if "inv_freq" not in buffers:
        return f"{kind} rotates its layers by several tables ({', '.join(sorted(buffers)) or 'none'})"
    without = settings.get("no_rope_layers")
    if without and not all(without):  # 1 for a layer that rotates
        return f"{kind} has layers that do not rotate"
    return _why_not_rotated(language_model, rotary, buffers["inv_freq"])


def _why_not_rotated(language_model: Any, rotary: Any, inv_freq: torch.Tensor) -> str | None:
    """Try the decoder's own rotation against ours on one key."""
    attention: Any = getattr(language_model.layers[0], "self_attn", None)
    if getattr(attention, "head_dim", None) is None:
        return f"its layers have no self_attn with a head_dim as Llama's, but are {type(language_model.layers[0]).__name__}"
    head_dim = int(attention.head_dim)
    if 2 * inv_freq.shape[0] != head_dim:
        return f"it rotates {2 * inv_freq.shape[0]} of a head's {head_dim} numbers"
    rotate = vars(sys.modules[type(attention).__module__]).get("apply_rotary_pos_emb")
    if rotate is None:
        return f"how {type(attention).__name__} rotates is not known here"
    if inv_freq.device.type == "meta":
        return None
    key = torch.linspace(-1, 1, head_dim, device=inv_freq.device).square().view(1, 1, 1, -1)
    turned = []
    for position in (0, PROBED_AT):
        cos, sin = rotary(key, position_ids=torch.full((1, 1), position, device=key.device))
        turned.append(rotate(key, key, cos, sin)[1])
    ours = rope.rotate_keys(turned[0][:, None], inv_freq, torch.tensor([PROBED_AT], device=key.device))[:, 0]
    if not torch.allclose(ours, turned[1], atol=TOLERANCE):
        return f"{type(attention).__name__} rotates other pairs of numbers (interleaved) than Llama's"
    return None


def _window(settings: dict[str, Any]) -> int | None:
    """The shortest window that some layer attends in; None: all attend to everything."""
    layers = settings.get("layer_types")
    if layers and not any("sliding" in kind or "chunked" in kind for kind in layers):
        return None
    found = [settings[key] for key in ("sliding_window", "attention_chunk_size") if settings.get(key)]
    return min(found) if found else None

