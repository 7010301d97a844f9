"""The socket between the layers of a Llama: visual tokens leave in the middle of the language model.

Source:  FastV, PyramidDrop and SparseVLM as one mechanism (docs/specs/baselines.md sections 5-7, 11, 12);
         transformers 5.23, LlamaModel.forward (its layer loop is ours here). Touches transformers' internals, as
         applied/hf_compat does.
Differs: the official codes patch a model file each, for one sample. Here scores are the needed rows of attention only,
         recomputed with a softmax in float32, so any attention backend and any batch will do. Each layer has its own mask
         and cache length; a ragged batch becomes left padding; decoding subtracts what renumbering took from positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaModel, MistralModel, Qwen2Model
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from htc_vlm.applied.prompts import (
    QueryRows,
    Rows,
    first_rows,
    image_columns,
    last_position,
    provenance,
    see,
    shrink,
)
from htc_vlm.compressors import Compressor, PruneStep
from htc_vlm.ops.select import gather_tokens, pack_left_padded

DECODERS = (LlamaModel, MistralModel, Qwen2Model)  # one layer loop, one form of attention


@dataclass(frozen=True)
class Past:
    """What decoding needs to know of a prefill; one entry per layer, the same tensor where nothing left in between."""

    n_columns: int  # of the prompt's mask
    is_real: tuple[Tensor, ...]  # (B, length of this layer's cache)
    shift: tuple[Tensor, ...]  # (B,), by how much positions are smaller than without renumbering


class DropRun:
    """State of the method while it is applied: what each cache went through, and the last run's measured schedule."""

    def __init__(self, method: Compressor) -> None:
        self.method = method
        self.past: WeakKeyDictionary[Cache, Past] = WeakKeyDictionary()
        self.prompt_length: int | None = None  # of the prompt that is being answered (generate)
        self.schedule: list[int] | None = None
        self.sources: dict[int, Tensor] = {}  # layer -> (I, tokens of an image that enter it, P), which patch is in which

    @property
    def source(self) -> Tensor | None:
        """The last of `sources`; None before the first image."""
        return self.sources[max(self.sources)] if self.sources else None


class Dropping(nn.Module):
    """Mixed in front of the language model's class while a method is applied."""

    layers: Any
    norm: Any
    rotary_emb: Any
    embed_tokens: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image: Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the language model's. image (B, L): see Rows; prompt_length: columns after it are answers, which do not
        score (None: all are prompt)."""
        run: DropRun = self.__dict__["_run"]
        prompt_length = run.prompt_length if prompt_length is None else prompt_length
        past = None if past_key_values is None else run.past.get(past_key_values)
        if past is None and image is None:
            check_foreign_cache(past_key_values)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"{run.method.name} masks by itself; give a 2-D attention_mask, got {attention_mask.ndim}-D")
        arguments = (inputs_embeds, attention_mask, position_ids, past_key_values)
        if image is None or past is not None:
            if image is not None:
                raise ValueError(f"{run.method.name}: images after a cached prompt; give the whole conversation at once")
            return self._continue(*arguments, past=past, **kwargs)
        return self._prefill(*arguments, use_cache=use_cache, image=image, prompt_length=prompt_length, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _prefill(
        self,
        states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None = None,
        *,
        image: Tensor,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        run: DropRun = self.__dict__["_run"]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        check_empty_dynamic(run.method, cache)
        rows = first_rows(run.method, states, attention_mask, position_ids, image, prompt_length)
        n_layers = len(self.layers)
        n_images, n_patches = image_columns(rows).shape
        drops = {drop.layer: drop for drop in run.method.drops(n_patches, n_layers)}
        first = previous = rows
        log = RunLog(n_patches, torch.eye(n_patches, device=states.device).expand(n_images, -1, -1))
        for index, layer in enumerate(self.layers):
            if index in drops:
                rows = self._drop(rows, previous, drops[index], cache, log)
            if index == 0 or index in drops:
                mask, rotary = self._mask(index, rows.states, rows.is_real, cache), self._rotary(rows)
                shift = last_position(first) - last_position(rows)
                n_now = image_columns(rows).shape[1]
            log.is_real.append(rows.is_real)
            log.shift.append(shift)
            log.schedule.append(n_now)
            previous = rows
            leaving = self._layer(layer, rows.states, mask, rotary, cache, kwargs)
            rows = replace(rows, states=leaving)
        check_promise(run.method, log.schedule, n_patches)
        run.schedule, run.sources = log.schedule, log.sources
        if cache is not None:
            run.past[cache] = Past(states.shape[1], tuple(log.is_real), tuple(log.shift))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(rows.states), past_key_values=cache)

    def _drop(self, rows: Rows, previous: Rows, drop: PruneStep, cache: Cache | None, log: RunLog) -> Rows:
        """What enters layer drop.layer, of what the layer before has left. `previous`: what entered that."""
        method: Compressor = self.__dict__["_run"].method
        columns = image_columns(rows)
        if drop.scores == "attention":
            scoring, layer = previous, self.layers[drop.layer - 1]
        elif drop.scores == "next":
            scoring, layer = rows, self.layers[drop.layer]
        else:
            raise ValueError(f"{method.name}: Drop.scores is {drop.scores!r}; known: attention, next")
        if drop.scores == "attention" and cache is not None:
            keys = cache.layers[drop.layer - 1].keys
        else:
            keys = self._keys(layer, scoring)
        seen = see(self._attention_rows(layer, scoring, keys), rows, columns, log.n_patches, self.rotary_emb.inv_freq)
        decision = method.after_layer(drop.layer - 1, seen)
        if decision is None:
            return rows
        log.sources[drop.layer] = provenance(log.sources[max(log.sources)], decision)
        return shrink(rows, decision, columns, drop.renumber)

    def _attention_rows(self, layer: Any, rows: Rows, keys: Tensor) -> QueryRows:
        """What the query tokens look at in `layer`, whose input is `rows` and whose rotated keys are given."""
        packed = pack_left_padded(rows.is_query)  # (B, R)
        attention = layer.self_attn
        states = layer.input_layernorm(gather_tokens(rows.states, packed.index))
        query = attention.q_proj(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, H, R, head_dim)
        position = rows.position.gather(1, packed.index)
        query, _ = apply_rotary_pos_emb(query, query, *self.rotary_emb(states, position_ids=position))
        score = (query @ repeat_kv(keys, attention.num_key_value_groups).transpose(2, 3)).float() * attention.scaling
        column = torch.arange(score.shape[-1], device=score.device)
        visible = (column <= packed.index[..., None]) & rows.is_real[:, None]  # (B, R, N)
        score = score.masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        return QueryRows(score.softmax(dim=-1), packed.is_real, position)

    def _keys(self, layer: Any, rows: Rows) -> Tensor:
        """(B, kv heads, N, head_dim), rotated, as `layer` would cache them."""
        attention = layer.self_attn
        key = attention.k_proj(layer.input_layernorm(rows.states))
        key = key.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return apply_rotary_pos_emb(key, key, *self._rotary(rows))[1]

    def _rotary(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.rotary_emb(rows.states, position_ids=rows.position)

    def _mask(self, index: int, states: Tensor, is_real: Tensor, cache: Cache | None) -> Any:
        """Never from position_ids: gaps in them would be taken for packed sequences."""
        return create_causal_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=is_real.long(),
            past_key_values=cache,
            layer_idx=index,
        )

    def _layer(self, layer: Any, states: Tensor, mask: Any, rotary: Any, cache: Cache | None, kwargs: dict[str, Any]) -> Tensor:
        return layer(
            states,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=None,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )

    @merge_with_config_defaults
    @capture_outputs
    def _continue(
        self,
        states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        past: Past,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """New tokens over a cache whose layers hold different numbers of tokens."""
        batch, n_new = states.shape[:2]
        n_done = cache.get_seq_length() - past.is_real[0].shape[1]  # decoded before; nothing leaves before layer 0
        if attention_mask is None:
            is_new = torch.ones(batch, n_done + n_new, dtype=torch.bool, device=states.device)
        else:
            is_new = attention_mask[:, past.n_columns :].bool()
        if position_ids is None:
            position_ids = torch.arange(n_new, device=states.device)[None] + past.n_columns + n_done
        for index, layer in enumerate(self.layers):
            if index == 0 or past.is_real[index] is not past.is_real[index - 1]:
                is_real = torch.cat((past.is_real[index], is_new), dim=1)
                mask = self._mask(index, states, is_real, cache)
                rotary = self.rotary_emb(states, position_ids=position_ids - past.shift[index][:, None])
            states = self._layer(layer, states, mask, rotary, cache, kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states), past_key_values=cache)


@functools.cache
def dropping_class(cls: Any) -> type:
    """`cls`, a language model, with dropping; under the same name, by which transformers finds what it may record."""
    return type(cls.__name__, (Dropping, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def check_decoder(language_model: Any, method: Compressor) -> None:
    """ValueError unless the layer loop here is this language model's."""
    if not isinstance(language_model, DECODERS):
        raise ValueError(
            f"{method.name} acts between the layers of Llama, Mistral or Qwen2, this model has "
            f"{type(language_model).__name__}; what acts before the language model works: divprune, random_drop, tome"
        )
    kinds = set(language_model.config.to_dict().get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"} or language_model.config.to_dict().get("sliding_window") is not None:
        raise ValueError(f"{method.name} does not support sliding-window attention (layer types {sorted(kinds)})")


def check_foreign_cache(cache: Cache | None) -> None:
    """ValueError for a cache with dropped tokens of which nothing is known: a copy, or one made by another `apply`."""
    lengths = {cache.get_seq_length(i) for i in range(len(cache.layers))} if isinstance(cache, DynamicCache) else set()
    if len(lengths) > 1:
        raise ValueError(
            f"this cache has layers of {sorted(lengths)} entries, dropped elsewhere; continue inside the `with` block "
            "that made it, with the cache itself and not a copy"
        )


def check_empty_dynamic(method: Compressor, cache: Cache | None) -> None:
    """ValueError unless layers of the cache may hold different numbers of tokens, and none yet."""
    if cache is None:
        return
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"{method.name} needs a DynamicCache (layers differ in length), got {type(cache).__name__}")
    if cache.get_seq_length():
        raise ValueError(f"{method.name}: images after a cached prompt; give the whole conversation at once")


def check_promise(method: Compressor, measured: list[int], n_patches: int) -> None:
    """ValueError where the run was not what `schedule` says."""
    promised = method.schedule(n_patches, len(measured))
    if measured != promised:
        raise ValueError(f"{method.name} promised the schedule {promised}, the run had {measured}")


class RunLog:
    """What is noted while a prompt runs."""

    def __init__(self, n_patches: int, source: Tensor) -> None:
        self.n_patches = n_patches
        self.sources = {0: source}
        self.is_real: list[Tensor] = []
        self.shift: list[Tensor] = []
        self.schedule: list[int] = []
