"""What `generate` may be asked for over compressed images, and how its lengths count.

Source:  transformers 5.23, GenerationMixin.generate and GenerationConfig.
Differs: transformers half runs some options over a cache that holds images (prompts in parts, guessed tokens, no cache); here
         they are refused by name. Lengths count the prompt as it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from htc_vlm.applied.hf_compat import generate_option

# Options that read the prompt in parts, or guess tokens and run them all again: the images' kv would be read or placed twice.
NOT_OVER_IMAGES = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "use_mtp")
# Arguments that say where tokens stand, or what they are, which the images decide.
PLACED = ("inputs_embeds", "position_ids", "kv_positions", "mm_encoder_outputs", "past_key_values")
Configs = Sequence[GenerationConfig | None]  # the one given to a call, then the model's own


def check_over_images(configs: Configs, kwargs: Mapping[str, Any]) -> None:
    """ValueError, naming the option, for ways to generate that cannot go over compressed images."""
    for name in NOT_OVER_IMAGES:
        value = generate_option(name, kwargs, *configs)
        if value:
            shown = value if isinstance(value, int | str) else type(value).__name__
            raise ValueError(
                f"{name}={shown!r} does not go with compressed images, whose keys and values stand before the prompt; leave "
                f"it out, or set it to None in the generation config (use an uncompressed model for it)"
            )
    if generate_option("use_cache", kwargs, *configs) is False:
        raise ValueError("use_cache=False does not go with compressed images: they are in the cache; leave it out")
    given = [name for name in PLACED if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be given with compressed images, which are placed by input_ids and attention_mask; "
            "give those, and leave the others out"
        )


def own_cache(kwargs: dict[str, Any], configs: Configs, kinds: Sequence[str]) -> str | None:
    """The cache_implementation that a call asks for; `kwargs` change so that generate takes a ready-made cache.

    ValueError for another than `kinds`.
    """
    kind: str | None = generate_option("cache_implementation", kwargs, *configs)
    if kind is not None and kind not in kinds:
        raise ValueError(f"cache_implementation is {kind!r}; over compressed images: {', '.join(map(repr, kinds))}")
    kwargs.pop("cache_implementation", None)
    if any(getattr(config, "cache_implementation", None) is not None for config in configs):
        kwargs["cache_implementation"] = None  # counts before what the configurations say
    return kind


def check_fuses_once(method: str, configs: Configs, kwargs: Mapping[str, Any]) -> None:
    """ValueError for generating without a cache where words read the picture first: each new answer token would, too."""
    if generate_option("use_cache", kwargs, *configs) is False:
        raise ValueError(
            f"use_cache=False does not go with {method}: the answer's own tokens would be fused with the picture at each step; "
            "leave it out"
        )


def moved_lengths(configs: Configs, kwargs: dict[str, Any], n_given: int, n_run: int) -> dict[str, Any]:
    """max_length and min_length for a prompt that was given as n_given tokens and runs as n_run -> changed arguments.

    ValueError for a max_length that leaves no room.
    """
    moved, given = dict(kwargs), copy.deepcopy(configs[0])
    if given is not None:
        moved["generation_config"] = given
    longest = _longest(configs, kwargs)
    if longest is not None and longest <= n_given:
        raise ValueError(f"max_length is {longest}, the prompt alone has {n_given} tokens; raise it, or give max_new_tokens")
    for name in ("max_length", "min_length"):
        value = generate_option(name, kwargs, *configs)
        if value:
            value = max(0, value + n_run - n_given)
            if given is None or name in kwargs:
                moved[name] = value
            else:
                setattr(given, name, value)
    return moved


def _longest(configs: Configs, kwargs: dict[str, Any]) -> int | None:
    """The max_length that counts, which it does where no max_new_tokens is said anywhere."""
    if generate_option("max_new_tokens", kwargs, *configs) is not None:
        return None
    longest: int | None = generate_option("max_length", kwargs, *configs)
    return longest


def n_reserved(configs: Configs, kwargs: dict[str, Any], n_given: int) -> int:
    """How many new tokens a static cache must have room for; ValueError where nothing says."""
    n_new, longest = generate_option("max_new_tokens", kwargs, *configs), _longest(configs, kwargs)
    if longest is not None:
        return longest - n_given
    if n_new is None:
        raise ValueError("a static cache is reserved at once; give max_new_tokens")
    return int(n_new)


def greedy_config(own: GenerationConfig) -> GenerationConfig:
    """What `greedy` leaves of a checkpoint's configuration."""
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
    return GenerationConfig(**{name: getattr(own, name) for name in kept}, do_sample=False)


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Inside the block a model decodes greedily, whatever its checkpoint's generation configuration says.

    Only the ids that end, pad and begin an answer, and those that it may never write (placeholders), are kept. transformers
    fills every option that a caller leaves at None from model.generation_config, so that is what is replaced.
    """
    own: GenerationConfig = model.generation_config
    model.generation_config = greedy_config(own)
    try:
        yield
    finally:
        model.generation_config = own
