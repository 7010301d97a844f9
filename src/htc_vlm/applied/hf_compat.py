"""Where our masks and caches meet transformers' internals (`apply` meets them in pruning.py and vision_tower.py).

Source:  transformers 5.23: masking_utils.create_causal_mask, LlamaModel, DynamicCache (read and tested).
Differs: nothing is patched: masks go in ready-made, caches are built from tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, LlavaConfig, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

HONOURS_MASKS = ("sdpa", "eager", "flex_attention")


def generate_option(name: str, arguments: Mapping[str, Any], *configs: GenerationConfig | None) -> Any:
    """A setting of generate as transformers takes it: its argument, or the first of `configs` that says it.

    configs: the one given to the call, then the model's own, from which transformers fills what the given one leaves at None.
    """
    said = [arguments[name]] if name in arguments else [getattr(config, name, None) for config in configs]
    value = next((one for one in said if one is not None), None)
    return None if name == "cache_implementation" and value == "hybrid" else value  # of old checkpoints; transformers drops it


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT wrapper, adapters in place; any other as it is. ValueError for learned prompts, which stay
    outside."""
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ValueError(f"{type(model).__name__} learns a prompt, which no image is compressed with; use LoRA")
    return model.get_base_model()


def check_has_images(prompt: Tensor | None, marks: Sequence[int | None]) -> None:
    """ValueError where a prompt has places for images (ids in `marks`) and no image came with it."""
    if prompt is None or prompt.is_floating_point():
        return
    if any(mark is not None and bool((prompt == mark).any()) for mark in marks):
        raise ValueError(
            "the prompt has places for images, and no image was given: the answer would come from nothing; give "
            "pixel_values=..., or compressed=... (what model.compress returned)"
        )


def ready_mask(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    visible: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """(B, L, L) bool, True = may look -> the 4-D form that the model's attention backend obeys.

    With a cache of n entries, visible is (B, L, n + L).

    A 4-D *bool* mask is obeyed by sdpa and silently all but ignored by eager, so the form is left to transformers.
    Raises ValueError for backends that ignore masks (flash attention).
    """
    backend = config._attn_implementation
    if backend not in HONOURS_MASKS:
        raise ValueError(
            f"this needs an attention mask, which {backend!r} ignores; load with attn_implementation="
            f"{' or '.join(map(repr, HONOURS_MASKS))} (answering from compressed images works with any backend)"
        )
    if attention_mask is None:  # never None: transformers would look for packed sequences in position_ids
        attention_mask = torch.ones(visible.shape[::2], dtype=torch.long, device=inputs_embeds.device)
    n_past = 0 if cache is None else cache.get_seq_length()
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        and_mask_function=lambda b, h, q, kv: visible[b, q - n_past, kv],
    )


def mask_over_kv(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    cache: Cache,
    position_ids: Tensor,
    kv_positions: Tensor,
) -> Any:
    """The mask for text with images in its midst, answered from a cache: a token sees the images before it only.

    kv_positions (B, n_cells): the position of each cached bottleneck token; the kv are the first n_cells columns. With a
    static cache generate has made the 4-D mask already, which is narrowed.
    """
    n_cells = kv_positions.shape[1]
    if isinstance(attention_mask, dict):  # generate's own, one for each kind of layer
        seen = kv_positions[:, None, :] < position_ids[:, :, None]
        return {kind: _narrowed(mask, seen) for kind, mask in attention_mask.items()}
    if attention_mask is not None and attention_mask.ndim == 4:
        return _narrowed(attention_mask, kv_positions[:, None, :] < position_ids[:, :, None])
    if attention_mask is None:
        n_columns = cache.get_seq_length() + inputs_embeds.shape[1]
        attention_mask = torch.ones((inputs_embeds.shape[0], n_columns), dtype=torch.long, device=inputs_embeds.device)
    n_columns = attention_mask.shape[1]
    places = torch.nn.functional.pad(kv_positions, (0, n_columns - n_cells), value=torch.iinfo(torch.long).min)
    n_past = cache.get_seq_length()
    seen = places[:, None, :] < position_ids[:, :, None]  # (B, new tokens, columns)
    if config._attn_implementation not in HONOURS_MASKS:
        raise ValueError(
            f"images amid the text need an attention mask, which {config._attn_implementation!r} ignores; put the "
            f"images first or load with attn_implementation={' or '.join(map(repr, HONOURS_MASKS))}"
        )
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        and_mask_function=lambda b, h, q, kv: seen[b, q - n_past, kv],
    )


def _narrowed(mask: Tensor, seen: Tensor) -> Tensor:
    """A ready 4-D mask (B, 1, L, n) without what `seen` (B, L, n_cells) denies of its first columns."""
    seen = torch.nn.functional.pad(seen, (0, mask.shape[3] - seen.shape[2]), value=True)[:, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def cache_from_kv(keys: Tensor, values: Tensor, batch: int, config: PreTrainedConfig) -> DynamicCache:
    """A cache of its own that begins with kv; the kv themselves are not copied, nor written to.

    keys, values (B or 1, layers, kv heads, n, head_dim); with 1, all `batch` rows share them until the first pass, whose
    growing cache copies them (n entries a row) in front of each row's own text.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        key, value = keys[:, i].expand(batch, -1, -1, -1), values[:, i].expand(batch, -1, -1, -1)
        if type(layer) is DynamicLayer:  # what its `update` does when empty, without concatenating to nothing
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
            layer.keys, layer.values = key, value
        else:
            layer.update(key, value)
    return cache


def static_cache_from_cells(
    keys: Tensor, values: Tensor, batch: int, n_copies: int, n_entries: int, config: PreTrainedConfig
) -> StaticCache:
    """As `cache_from_kv`, but all `n_entries` of each row are reserved now; the kv are copied into every row.

    n_copies: rows of each prompt (beams, return sequences); the cache has batch * n_copies.
    """
    cache = StaticCache(config=config, max_cache_len=n_entries)
    for i, layer in enumerate(cache.layers):
        if type(layer) is not StaticLayer:
            raise ValueError(
                f"layer {i} of this decoder keeps a {type(layer).__name__}; use cache_implementation='dynamic'"
            )
        key, value = keys[:, i].expand(batch, -1, -1, -1), values[:, i].expand(batch, -1, -1, -1)
        layer.update(key.repeat_interleave(n_copies, dim=0), value.repeat_interleave(n_copies, dim=0))
    return cache


def has_past(cache: Cache | None, n_new: int) -> bool:
    """Does a cache, where there is one, hold anything before these n_new tokens? A static cache counts on the device; asking
    it in each step of decoding would wait for the device, and one new token always has a past."""
    if cache is None:
        return False
    length = cache.get_seq_length()
    return (n_new == 1 or bool(length > 0)) if isinstance(length, Tensor) else length > 0


def run_over_cache(
    decoder: Any, cache: DynamicCache, recomputed_in: Callable[[], AbstractContextManager] = nullcontext, **inputs: Any
) -> Any:
    """A decoder's pass that reads `cache` and writes to it, with gradients too, whether its layers are checkpointed or not.

    recomputed_in: what checkpointed layers are computed again in, where the pass itself runs in such a block.
    """
    with checkpointing_over(cache, decoder, recomputed_in):
        out = decoder(past_key_values=cache, use_cache=False, **inputs)
    out.past_key_values = cache
    return out


@contextmanager
def checkpointing_over(
    cache: DynamicCache, decoder: Any, recomputed_in: Callable[[], AbstractContextManager]
) -> Iterator[None]:
    """Inside the block checkpointed layers keep their cache, which transformers else takes from them: one that counts the last
    writing only can be written again in the backward pass. Without reentry, so that gradients reach what was written."""
    former = [(layer, name, vars(layer)[name]) for layer, name in checkpointed_layers(decoder)]
    if former:
        cache.layers = [Rewritable(layer) for layer in cache.layers]
    for layer, name, checkpoint in former:
        layer._can_checkpoint_with_cache = True
        again = functools.partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputed_in()))
        setattr(layer, name, again)
    try:
        yield
    finally:
        for layer, name, checkpoint in former:
            del layer._can_checkpoint_with_cache
            setattr(layer, name, checkpoint)


def checkpointed_layers(decoder: Any) -> Iterator[tuple[Any, str]]:
    """Each layer whose activations are computed again, and the name of its checkpoint function: transformers' own, or torch's
    wrapper around it, which FSDP puts there."""
    for part in decoder.layers.modules():
        if "checkpoint_fn" in vars(part):
            yield part, "checkpoint_fn"
        elif decoder.training and vars(part).get("gradient_checkpointing"):
            yield part, "_gradient_checkpointing_func"


class Rewritable(DynamicLayer):
    """A cache layer of one pass: what is written again takes the place of what was written first."""

    def __init__(self, begin: Any) -> None:
        super().__init__()
        self.begin: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
        if begin.is_initialized:
            self.dtype, self.device, self.is_initialized = begin.keys.dtype, begin.keys.device, True
            self.keys, self.values = begin.keys, begin.values
            self.begin = (begin.keys,), (begin.values,)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat((*self.begin[0], key_states), dim=-2)
        self.values = torch.cat((*self.begin[1], value_states), dim=-2)
        return self.keys, self.values


def kv_from_cache(cache: DynamicCache, n_last: int) -> Tensor:
    """The last n_last entries of every layer -> (B, layers, 2, kv heads, n_last, head_dim)."""
    layers = [torch.stack((layer.keys[:, :, -n_last:], layer.values[:, :, -n_last:]), dim=1) for layer in cache.layers]
    return torch.stack(layers, dim=1)


def attention_of_last_rows(
    language_model: Any,
    hidden_states: tuple[Tensor, ...],
    cache: DynamicCache,
    position_ids: Tensor,
    n_last: int,
) -> Tensor:
    """What the last n_last tokens looked at, recomputed from a finished pass -> (B, layers, H, n_last, L).

    Rows sum to 1. hidden_states: the inputs of the layers (output_hidden_states=True); `cache` holds that pass's
    rotated keys. The last rows must see all L tokens but the later ones among themselves, as bottleneck tokens in a
    compress pass do. The pass itself is not changed by asking.
    """
    cos, sin = language_model.rotary_emb(hidden_states[0], position_ids=position_ids)
    cos, sin = cos[:, -n_last:], sin[:, -n_last:]
    rows = []
    for layer, entering, stored in zip(language_model.layers, hidden_states, cache.layers, strict=False):
        attention = layer.self_attn
        last = layer.input_layernorm(entering[:, -n_last:])
        query = attention.q_proj(last).unflatten(-1, (-1, attention.head_dim))
        query = attention.q_norm(query).transpose(1, 2) if hasattr(attention, "q_norm") else query.transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        keys = repeat_kv(stored.keys, attention.num_key_value_groups)
        scores = (query @ keys.transpose(2, 3)).float() * attention.scaling
        length = scores.shape[-1]
        future = torch.ones(n_last, length, dtype=torch.bool, device=scores.device).triu(length - n_last + 1)
        rows.append(scores.masked_fill(future, float("-inf")).softmax(dim=-1))
    return torch.stack(rows, dim=1)


def deep_features(is_visual: Tensor, deep: Tensor | None) -> dict[str, Any]:
    """What a decoder is given to add `deep` (n, N, C, D) behind its first n layers to the tokens where is_visual (N, L)."""
    if deep is None:
        return {}
    return {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(deep.flatten(1, 2))}


def compute_dtype(module: nn.Module, other: torch.dtype) -> torch.dtype:
    """The dtype that a module computes in: of its first weight in floating point, else `other`. Quantised weights (int8, packed
    4 bits) say nothing; their biases do."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), other)


def in_unit_range(pixel_values: Tensor, config: Any) -> Tensor:
    """Pixels (B, 3, height, width), normalised as config.image_mean and image_std say -> in [0, 1]."""
    mean, std = (torch.tensor(one, device=pixel_values.device) for one in (config.image_mean, config.image_std))
    return (pixel_values.float() * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)).clamp(0, 1)


NO_CLASS_TOKEN = ("efficientnet_lite", "siglip_vision_model")  # towers whose features are patches and nothing else


def n_patches(config: LlavaConfig) -> int:
    """P, visual tokens of one image that the projector gets: the patch grid, and a class token where one is kept."""
    vision = config.vision_config
    keeps_class_token = config.vision_feature_select_strategy == "full" and vision.model_type not in NO_CLASS_TOKEN
    return int((vision.image_size // vision.patch_size) ** 2) + int(keeps_class_token)
