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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    LlamaModel,
    MistralModel,
    Qwen2_5_VLTextModel,
    Qwen2Model,
    Qwen3Model,
    Qwen3VLTextModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from htc_vlm.applied.door import Past, Run, dense
from htc_vlm.applied.prompts import (
    Change,
    Group,
    QueryRows,
    Rows,
    first_axis,
    first_rows,
    groups_of,
    image_columns,
    last_position,
    see,
    shrink,
    source_after,
)
from htc_vlm.compressors import Compressor, PruneStep
from htc_vlm.ops.select import gather_tokens, pack_left_padded

# One layer loop, one form of attention (Qwen3 norms queries and keys; two of them have M-RoPE, the last adds deep features).
DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model, Qwen2_5_VLTextModel, Qwen3VLTextModel)
DEEP = ("visual_pos_masks", "deepstack_visual_embeds")


@dataclass
class DropRun(Run):
    """State of a method inside the language model while it is applied, and the last run's measured schedules."""

    schedules: list[list[int]] = field(default_factory=list)  # of each image
    logs: list[GroupLog] = field(default_factory=list)

    @property
    def sources(self) -> dict[int, Tensor]:
        """Layer -> (I, tokens of an image that enter it, P), which patch is in which."""
        if len(self.logs) > 1:
            raise ValueError("the last images had different numbers of tokens; ask about one picture at a time")
        return self.logs[0].sources if self.logs else {}


@dataclass
class GroupLog:
    """What became of a group of images while a prompt ran."""

    group: Group
    method: Compressor
    steps: dict[int, PruneStep]
    sources: dict[int, Tensor]
    schedule: list[int] = field(default_factory=list)


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
        **kwargs: Any,
    ) -> Any:
        """As the decoder's."""
        run: DropRun = self.__dict__["_run"]
        past = None if past_key_values is None else run.past.get(past_key_values)
        if past is None and run.prompt is None:
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
        name = run.method_of(run.n_nominal).name
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"{name} masks by itself; give a 2-D attention_mask, got {attention_mask.ndim}-D")
        position_ids = axes_of(position_ids, run.has_axes)
        arguments = (inputs_embeds, attention_mask, position_ids, past_key_values)
        if run.prompt is None or past is not None:
            if run.prompt is not None:
                raise ValueError(f"{name}: images after a cached prompt; give the whole conversation at once")
            return self._continue(*arguments, past=past, **kwargs)
        deep = dense({**kwargs, "inputs_embeds": inputs_embeds})
        kwargs = {key: value for key, value in kwargs.items() if key not in DEEP}
        return self._prefill(*arguments, use_cache=use_cache, deep=deep, **kwargs)

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
        deep: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        run: DropRun = self.__dict__["_run"]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        check_empty_dynamic(run.method_of(run.n_nominal), cache)
        n_columns, n_layers = states.shape[1], len(self.layers)
        rows, logs = self._first_rows(run, states, attention_mask, position_ids, deep)
        first = previous = rows
        real: list[Tensor] = []
        shifts: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            now = [log for log in logs if index in log.steps]
            if now:
                rows = self._drop(index, rows, previous, now, cache)
            if index == 0 or now:
                mask, rotary = self._mask(index, rows.states, rows.is_real, cache), self._rotary(rows)
                shift = last_position(first) - last_position(rows)
            real.append(rows.is_real)
            shifts.append(shift)
            for log in logs:
                log.schedule.append(image_columns(rows.image, log.group).shape[1])
            previous = rows
            leaving = self._layer(layer, rows.states, mask, rotary, cache, kwargs)
            if rows.deep is not None and index < len(rows.deep):
                leaving = leaving + rows.deep[index]
            rows = replace(rows, states=leaving)
        run.logs = logs
        run.schedules = schedules_of(logs, n_layers)
        if cache is not None:
            run.past[cache] = Past(n_columns, tuple(real), tuple(shifts))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(rows.states), past_key_values=cache)

    def _first_rows(
        self, run: DropRun, states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, deep: Tensor | None
    ) -> tuple[Rows, list[GroupLog]]:
        """The prompt as it enters layer 0, and a log for each group of its images."""
        assert run.prompt is not None
        image, logs = run.numbers(), []
        for group in groups_of(image):
            method, n = run.method_of(group.n_patches), group.n_patches
            steps = {step.layer: step for step in method.drops(n, len(self.layers))}
            whole = torch.eye(n, device=states.device).expand(len(group.images), -1, -1)
            logs.append(GroupLog(group, method, steps, {0: whole}))
        if position_ids is None and run.has_axes:
            position_ids = torch.arange(states.shape[1], device=states.device).expand(3, 1, -1)
        rows = first_rows(logs[0].method, states, attention_mask, position_ids, image, run.prompt.length)
        return replace(rows, deep=deep), logs

    def _drop(self, index: int, rows: Rows, previous: Rows, now: list[GroupLog], cache: Cache | None) -> Rows:
        """What enters layer `index`, of what the layer before has left. `previous`: what entered that."""
        step, name = now[0].steps[index], now[0].method.name
        if step.scores == "attention":
            scoring, layer = previous, self.layers[index - 1]
        elif step.scores == "next":
            scoring, layer = rows, self.layers[index]
        else:
            raise ValueError(f"{name}: PruneStep.scores is {step.scores!r}; known: attention, next")
        kept = cache.layers[index - 1].keys if cache is not None and step.scores == "attention" else None
        found = self._attention_rows(layer, scoring, self._keys(layer, scoring) if kept is None else kept)
        changes = []
        for log in now:
            columns = image_columns(rows.image, log.group)
            seen = see(found, rows, columns, log.group.n_patches, self.rotary_emb.inv_freq)
            decision = log.method.after_layer(index - 1, seen)
            if decision is not None:
                log.sources[index] = source_after(log.sources[max(log.sources)], decision)
                changes.append(Change(columns, decision))
        return shrink(rows, changes, step.renumber) if changes else rows

    def _attention_rows(self, layer: Any, rows: Rows, keys: Tensor) -> QueryRows:
        """What the query tokens look at in `layer`, whose input is `rows` and whose rotated keys are given."""
        packed = pack_left_padded(rows.is_query)  # (B, R)
        attention = layer.self_attn
        states = layer.input_layernorm(gather_tokens(rows.states, packed.index))
        query = headed(attention, attention.q_proj(states), "q_norm")  # (B, H, R, head_dim)
        index = packed.index.expand(*rows.position.shape[:-1], -1)
        position = rows.position.gather(-1, index)
        query, _ = apply_rotary_pos_emb(query, query, *self.rotary_emb(states, position_ids=position))
        score = (query @ repeat_kv(keys, attention.num_key_value_groups).transpose(2, 3)).float() * attention.scaling
        column = torch.arange(score.shape[-1], device=score.device)
        visible = (column <= packed.index[..., None]) & rows.is_real[:, None]  # (B, R, N)
        score = score.masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
        return QueryRows(score.softmax(dim=-1), packed.is_real, first_axis(position))

    def _keys(self, layer: Any, rows: Rows) -> Tensor:
        """(B, kv heads, N, head_dim), rotated, as `layer` would cache them."""
        attention = layer.self_attn
        key = headed(attention, attention.k_proj(layer.input_layernorm(rows.states)), "k_norm")
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
        run: DropRun = self.__dict__["_run"]
        if position_ids is None:
            position_ids = torch.arange(n_new, device=states.device)[None] + past.n_columns + n_done
            position_ids = position_ids.expand(3, 1, -1) if run.has_axes else position_ids
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


def headed(attention: Any, projected: Tensor, norm: str) -> Tensor:
    """(B, N, H * head_dim) -> (B, H, N, head_dim), through the norm of queries or keys where the decoder has one."""
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    normed = getattr(attention, norm, None)
    return (heads if normed is None else normed(heads)).transpose(1, 2)


def axes_of(position_ids: Tensor | None, has_axes: bool) -> Tensor | None:
    """position_ids as the rotary embedding takes them: with M-RoPE (3, B, N), without the order of the text in front."""
    if position_ids is None or not has_axes:
        return position_ids
    if position_ids.ndim == 2:
        position_ids = position_ids[None]
    return position_ids[-3:].expand(3, -1, -1)


def schedules_of(logs: list[GroupLog], n_layers: int) -> list[list[int]]:
    """One list for each image. ValueError where the run was not what `schedule` says."""
    by_image: dict[int, list[int]] = {}
    for log in logs:
        promised = log.method.schedule(log.group.n_patches, n_layers)
        if log.schedule != promised:
            raise ValueError(f"{log.method.name} promised the schedule {promised}, the run had {log.schedule}")
        by_image.update(dict.fromkeys(log.group.images.tolist(), log.schedule))
    return [by_image[i] for i in sorted(by_image)]


def check_decoder(language_model: Any, method: Compressor) -> None:
    """ValueError unless the layer loop here is this language model's."""
    if not isinstance(language_model, DECODERS):
        raise ValueError(
            f"{method.name} acts between the layers of Llama, Mistral, Qwen2, Qwen3, Qwen2.5-VL or Qwen3-VL, this model has "
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
