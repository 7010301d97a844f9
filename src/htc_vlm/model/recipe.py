"""Recipe of compressed images: everything that decides what a picture becomes, in one SHA-256.

Source:  nothing published; vLLM 42119, 55547 and SGLang 25462 are what happens to caches whose key leaves something out.
Differs: a dtype and a device are no part of it, so that what a bfloat16 load made can be asked by a float32 load.
"""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from htc_vlm.model.weights_digest import Watch, weights_digest

FORMAT = 2  # of the numbers that a recipe stands for: raise it when the same parts would give other kv

# What a configuration says that changes no number of a forward pass.
WITHOUT_EFFECT = frozenset(
    "_name_or_path transformers_version architectures dtype torch_dtype output_hidden_states output_attentions return_dict "
    "id2label label2id problem_type use_cache chunk_size_feed_forward is_encoder_decoder initializer_range attention_dropout "
    "pretraining_tp pad_token_id bos_token_id eos_token_id image_seq_length auto_map processor_class image_processor_type "
    "feature_extractor_type data_format input_data_format device return_tensors disable_grouping".split()
)


@dataclass(frozen=True)
class Recipe:
    """What made compressed images.

    parts: format, weights (SHA-256 of `weights_digest`: active adapters and their merge state included), model and processor
    configurations, compressor settings, and whatever a caller of `recipe_of` added. JSON only.

    >>> Recipe({"format": 2, "compressor": {"name": "voco"}}).digest[:8], len(Recipe({}).digest)
    ('dcc0fd24', 64)
    """

    parts: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """64 hex digits: SHA-256 of the parts as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Names of what differs in another recipe's parts.

        >>> Recipe({"processor": {"size": 2, "do_pad": True}}).differences({"processor": {"size": 3, "do_pad": True}})
        ['processor.size']
        """
        return list(_differences("", self.parts, other))

    def __str__(self) -> str:
        return self.digest


def _differences(name: str, here: Any, there: Any) -> Iterator[str]:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in sorted(here.keys() | there.keys()):
            yield from _differences(f"{name}.{key}" if name else key, here.get(key), there.get(key))
    elif here != there:
        yield name


@dataclass(frozen=True)
class _Known:
    watch: Watch
    weights: str
    seen: list[tuple[Any, dict[str, Any]]]
    extra: str
    recipe: Recipe


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def recipe_of(model: nn.Module, image_processor: Any = None, extra: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a model as it is now. Asked again, it takes microseconds until weights, adapters or settings change.

    image_processor: what makes the model's pixels; None where that is not known, which is a recipe of its own.
    extra: further parts, JSON only (a prefix's token ids, a method's settings): {"prefix": [1, 2]}.
    ValueError for weights that are not in this process, see `weights_digest`.
    """
    written = json.dumps(extra or {}, sort_keys=True)
    known = _KNOWN.get(model)
    is_same = known is not None and known.watch.holds()
    sources = [getattr(model, "config", None), image_processor]
    if known is not None and is_same and known.extra == written and _unchanged(known.seen, sources):
        return known.recipe
    watch = known.watch if known is not None and is_same else Watch(model)
    weights = known.weights if known is not None and is_same else weights_digest(model)
    seen = [entry for source in sources for entry in _snapshot(source)]
    recipe = Recipe({"format": FORMAT, "weights": weights, **_settings(*sources), **json.loads(written)})
    if known is None or not is_same:  # an adapter that had to be unmerged wrote weights
        watch = Watch(model)
    _KNOWN[model] = _Known(watch, weights, seen, written, recipe)
    return recipe


def _settings(config: Any, image_processor: Any) -> dict[str, Any]:
    """Configuration objects -> the recipe's parts model, compressor and processor."""
    model = _plain(config.to_dict()) if config is not None else {}
    processor = None
    if image_processor is not None:
        kind = type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
        processor = {"kind": kind, **_plain(image_processor.to_dict())}
    return {"compressor": model.pop("compressor", None), "model": model, "processor": processor}


def _plain(value: Any) -> Any:
    """JSON values without None and without what has no effect; sequences as lists.

    >>> _plain({"size": (2, 3), "device": "cpu", "pad": None})
    {'size': [2, 3]}
    """
    if isinstance(value, Mapping):
        kept = {str(key): _plain(item) for key, item in value.items() if key not in WITHOUT_EFFECT}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


# ----------------------------------------------------------------------------------------------------- watching settings
def _snapshot(source: Any) -> list[tuple[Any, dict[str, Any]]]:
    """(object, its attributes) of a configuration, and of those inside it; to_dict would take 10 ms before each answer."""
    if source is None:
        return [(None, {})]
    inside = {key: value for key, value in vars(source).items() if _is_config(value)}
    own = {key: value if key in inside else copy.deepcopy(value) for key, value in vars(source).items()}
    return [(source, own), *(entry for value in inside.values() for entry in _snapshot(value))]


def _unchanged(seen: list[tuple[Any, dict[str, Any]]], sources: list[Any]) -> bool:
    objects = [id(source) for source, _ in seen]
    if any(id(source) not in objects for source in sources):
        return False
    return all(_same(vars(source), kept) for source, kept in seen if source is not None)


def _same(now: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    if len(now) != len(kept):
        return False
    for key, value in kept.items():
        current = now.get(key)
        if current is not value and (_is_config(value) or current != value):
            return False
    return True


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")
