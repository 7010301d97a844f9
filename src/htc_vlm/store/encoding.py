"""Compresses pictures for a store: with a model's own bottleneck, or a question-independent method on any stock model.

Source:  prefix_cache.py for stock models.
Differs: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from htc_vlm.model import prefix_cache
from htc_vlm.model.answering import Answerer, one_by_one_if_refused
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.recipe import Recipe, recipe_of

NO_METHOD = (
    "this model has no bottleneck; name a question-independent method that says what is kept of a picture (--method divprune "
    "--budget 64, method={'name': 'divprune', 'n_keep': 64}), or 'none' for all of it"
)


class OwnBottleneck:
    """Of a model that was trained to compress; maps are kept where asked for."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._answerer = Answerer(model, processor)

    def recipe(self) -> Recipe:
        return self._answerer.recipe()

    def encode(self, pictures: Sequence[Image.Image], maps: bool) -> list[CompressedImages]:
        """One CompressedImages, of all pictures."""
        images = self._answerer.encode(pictures, maps=maps)
        assert isinstance(images, CompressedImages)
        return [images]


class StockMethod:
    """A method on a stock model: what is kept is [text before the image; kept tokens], see prefix_cache.py."""

    def __init__(self, model: Any, processor: Any, method: Mapping[str, Any]) -> None:
        self._model, self._processor = model, processor
        self._name = str(method["name"])
        self._settings = {key: value for key, value in method.items() if key != "name"}
        self._prompt = prefix_cache.prompt_of(model, processor, self._name, **self._settings)  # the same for every picture

    def recipe(self) -> Recipe:
        image_processor = getattr(self._processor, "image_processor", None)
        return recipe_of(self._model, image_processor, extra={"prompt": self._prompt})

    def encode(self, pictures: Sequence[Image.Image], maps: bool) -> list[CompressedImages]:
        """One CompressedImages a picture, since pictures of other sizes may have other counts of entries. There are no maps."""
        return [self._compress(picture) for picture in pictures]

    def _compress(self, picture: Image.Image) -> CompressedImages:
        return prefix_cache.compress(self._model, self._processor, [picture], self._name, **self._settings)


def encoder_of(
    model: Any, processor: Any, method: str | Mapping[str, Any] | None, stored: Mapping[str, Any] | None = None
) -> OwnBottleneck | StockMethod:
    """What compresses with this model. stored: the method of a store that is there, where none is named.

    ValueError for a method besides the model's own, and for one that needs the question.
    """
    if prefix_cache.own_bottleneck(model):
        if method is not None:
            raise ValueError(f"this model compresses with its own bottleneck; leave out method={method!r}")
        return OwnBottleneck(model, processor)
    method = stored if method is None else method
    if method is None and not prefix_cache.has_own_method(model):
        raise ValueError(NO_METHOD)
    if isinstance(method, Mapping) and not isinstance(method.get("name"), str):
        raise ValueError(f"method is {dict(method)}; give its name, e.g. {{'name': 'divprune', 'n_keep': 64}}")
    return StockMethod(model, processor, {"name": method or "none"} if not isinstance(method, Mapping) else method)


def encode_each(
    encoder: OwnBottleneck | StockMethod, pictures: Sequence[Image.Image], maps: bool, refuse: Callable[[int, str], None]
) -> Iterator[tuple[list[int], CompressedImages]]:
    """(numbers of pictures, their images), in order. refuse(number, reason): see `one_by_one_if_refused`."""
    if not pictures:
        return
    for numbers, parts in one_by_one_if_refused(lambda some: encoder.encode(some, maps), pictures, refuse):
        left = list(numbers)
        for part in parts:
            yield left[: len(part)], part
            left = left[len(part) :]


def method_in(recipe: Recipe) -> Mapping[str, Any] | None:
    """The method on a stock model that made a store's images; None for a model's own."""
    found: Mapping[str, Any] | None = (recipe.parts.get("prompt") or {}).get("method")
    return None if found is None or found["name"] == prefix_cache.OWN else found


def heads_of(model: Any) -> tuple[int, int, int]:
    """(layers, kv heads, head_dim) of a model's language model."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, text.num_key_value_heads, head_dim
