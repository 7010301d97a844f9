"""What `generate` may be asked for over compressed images, and how its lengths count.

Source:  transformers 5.23, GenerationMixin.generate and GenerationConfig.
Differs: transformers half runs some options over a cache that holds images (prompts in parts, guessed tokens, no cache); here
         they are refused by name. Lengths count the prompt as it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

# Options that read the prompt in parts, or guess tokens and run them all again: the images' kv would be read or placed twice.
NOT_OVER_IMAGES = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "use_mtp")


def option(name: str, config: GenerationConfig, kwargs: dict[str, Any]) -> Any:
    """A setting of generate: its argument, or else its configuration's value."""
    value = kwargs.get(name)
    return getattr(config, name, None) if value is None else value


def check_over_images(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """ValueError, naming the option, for ways to generate that cannot go over compressed images."""
    for name in NOT_OVER_IMAGES:
        value = option(name, config, kwargs)
        if value:
            shown = value if isinstance(value, int | str) else type(value).__name__
            raise ValueError(
                f"{name}={shown!r} does not go with compressed images, whose keys and values stand before the prompt; leave "
                f"it out, or set it to None in the generation config (use an uncompressed model for it)"
            )
    if option("use_cache", config, kwargs) is False:
        raise ValueError("use_cache=False does not go with compressed images: they are in the cache; leave it out")


def check_has_images(prompt: Tensor | None, marks: Sequence[int | None]) -> None:
    """ValueError where a prompt has places for images (ids in `marks`) and no image came with it."""
    if prompt is None or prompt.is_floating_point():
        return
    found = [mark for mark in marks if mark is not None and bool((prompt == mark).any())]
    if found:
        raise ValueError(
            "the prompt has places for images, and no image was given: the answer would come from nothing; give "
            "pixel_values=..., or compressed=... (what model.compress returned)"
        )


def moved_lengths(given: GenerationConfig | None, kwargs: dict[str, Any], n_given: int, n_run: int) -> dict[str, Any]:
    """max_length and min_length for a prompt that was given as n_given tokens and runs as n_run -> changed arguments.

    given: the configuration passed to this call, if one was (what a checkpoint's own says, transformers counts from the end
    of the prompt). ValueError for a max_length that leaves no room.
    """
    moved = dict(kwargs)
    if given is not None:
        moved["generation_config"] = copy.deepcopy(given)
    longest = _longest(given, kwargs)
    if longest is not None and longest <= n_given:
        raise ValueError(f"max_length is {longest}, the prompt alone has {n_given} tokens; raise it, or give max_new_tokens")
    for name in ("max_length", "min_length"):
        if moved.get(name) is not None:
            moved[name] = max(0, moved[name] + n_run - n_given)
        if given is not None and getattr(given, name):
            setattr(moved["generation_config"], name, max(0, getattr(given, name) + n_run - n_given))
    return moved


def _longest(given: GenerationConfig | None, kwargs: dict[str, Any]) -> int | None:
    """The max_length that this call was given and that max_new_tokens does not take the place of."""
    if kwargs.get("max_new_tokens") is not None or (given is not None and given.max_new_tokens is not None):
        return None
    return kwargs["max_length"] if kwargs.get("max_length") is not None else given.max_length if given is not None else None


def n_reserved(config: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any], n_given: int) -> int:
    """How many new tokens a static cache must have room for; ValueError where nothing says."""
    n_new, longest = option("max_new_tokens", config, kwargs), _longest(given, kwargs)
    if longest is not None:
        return longest - n_given
    if n_new is None:
        raise ValueError("a static cache is reserved at once; give max_new_tokens")
    return int(n_new)


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Inside the block a model decodes greedily, whatever its checkpoint's generation configuration says.

    Only the ids that end, pad and begin an answer, and those that it may never write (placeholders), are kept. transformers
    fills every option that a caller leaves at None from model.generation_config, so that is what is replaced.
    """
    own: GenerationConfig = model.generation_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in kept}, do_sample=False)
    try:
        yield
    finally:
        model.generation_config = own
