"""Caches images of a stock model: the keys and values of a prompt up to its image, which any question then continues.

Source:  prefix caching (vLLM, SGLang), with a method that leaves fewer visual tokens in front; docs/design.md.
Differs: the image is cached with what a question-independent method leaves of it, in any family that `apply` knows, and what
         could make the answer another one is refused: another text before the image, a second image, another model,
         processor or method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from htc_vlm.applied import hf_compat
from htc_vlm.applied.apply import apply
from htc_vlm.applied.hf_compat import generate_option, unwrapped
from htc_vlm.compressors import COMPRESSORS, Compressor, build
from htc_vlm.model.answering import Answerer
from htc_vlm.model.compressed import CompressedImages, check_images
from htc_vlm.model.generation_options import check_over_images, greedy, own_cache
from htc_vlm.model.movable import check_context
from htc_vlm.model.recipe import recipe_of
from htc_vlm.model.weights_digest import check_is_here

OWN = "its own"  # the method of a model with a compressor


@dataclass(frozen=True)
class Asked:
    """One prompt about one image: ids of its own text before and after the image, and what the processor is given."""

    before: list[int]
    after: list[int]
    text: str | None  # None: `ids` are the whole prompt
    ids: list[int]


@torch.no_grad()
def compress(
    model: Any, processor: Any, images: Sequence[Any], method: str = "none", *, prompt: str | None = None, **settings: Any
) -> CompressedImages:
    """Pictures -> what any later question about each needs: keys and values of [text before the image; kept tokens].

    model: any vision-language model that `apply` knows; one with a bottleneck compresses with it. method, settings: as for
    `apply` (budget included), question-independent. prompt: with the processor's image token in it; what stands before that
    is cached too, and later prompts must begin alike (default: what the chat template writes).
    ValueError for methods that need the question, and for pictures that give different numbers of entries.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        what = "a picture" if isinstance(images, Image.Image) else f"{type(images).__name__} {images!r:.60}"
        raise ValueError(f"images is {what}; give a list of pictures, e.g. [Image.open('cat.png')]")
    model, images = unwrapped(model), list(images)
    if not images:
        raise ValueError("no picture given")
    if own_bottleneck(model):
        if method != "none":
            raise ValueError(f"this model compresses with its own bottleneck; leave out method={method!r}")
        return Answerer(model, processor).encode(images)  # type: ignore[return-value]
    check_is_here(model.get_input_embeddings().weight)
    asked = split(processor, "?" if prompt is None else prompt)
    inputs = [read(model, processor, asked, image) for image in images]
    made, context = method_of(model, method, settings)
    prefix = _prompt(processor, asked, inputs[0], made)
    recipe = recipe_of(model, getattr(processor, "image_processor", None), extra={"prompt": prefix})
    with context() as applied:
        if applied is not None:
            applied.run.is_one_picture = True
        kept = [entries(model, one) for one in inputs]
    counts = sorted({one.shape[4] for one, _ in kept})
    if len(counts) > 1:
        raise ValueError(
            f"these pictures give {', '.join(map(str, counts))} entries; compress pictures of one size together, or fix "
            "the number of tokens with the method's own setting (n_keep=...)"
        )
    return CompressedImages(torch.cat([kv for kv, _ in kept]), recipe.digest, [n for _, n in kept], prompt=prefix)


def prompt_of(model: Any, processor: Any, method: str, **settings: Any) -> dict[str, Any]:
    """`CompressedImages.prompt` of all that `compress` makes so, without making any. ValueError where it cannot."""
    model, asked = unwrapped(model), split(processor, "?")
    check_is_here(model.get_input_embeddings().weight)
    inputs = read(model, processor, asked, Image.new("RGB", (64, 64), "gray"))
    made, context = method_of(model, method, settings)
    with context():  # a method that does not act on this model is refused
        return _prompt(processor, asked, inputs, made)


def _prompt(processor: Any, asked: Asked, inputs: dict[str, Tensor], method: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "prefix": asked.before, "after": marks_after(processor, asked, inputs)}


@torch.no_grad()
def generate(
    model: Any,
    processor: Any,
    *,
    compressed: CompressedImages,
    text: Sequence[str],
    which: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Any:
    """Answers to `text` over compressed images, as the model gives them over the pictures themselves: one str for each.

    text: questions, or whole prompts with the processor's image token in them (which must begin as the cached ones). which:
    the image of each; by default one image is shared by all, or each has its own. options: as for transformers' generate;
    with return_dict_in_generate=True its output is returned, with the new tokens as `sequences`. Greedy and 64 new tokens at
    most by default, whatever the checkpoint's generation_config says; generation_config=model.generation_config obeys it.
    ValueError for images of another model, processor or method, another beginning, or a second image, and for options that
    cannot go over images.
    """
    check_images(compressed)
    model = unwrapped(model)
    text = [text] if isinstance(text, str) else list(text)
    if not text:
        raise ValueError("no question given; text=[...] takes one or more")
    which = images_of(len(text), len(compressed), which)
    if compressed.prompt is None:
        if not own_bottleneck(model):
            raise ValueError("these images were compressed by a bottleneck, which this model does not have")
        if options:
            raise ValueError(f"a model with a bottleneck takes {', '.join(options)} in model.generate(compressed=...)")
        return Answerer(model, processor).ask(compressed, which, text, 64 if max_new_tokens is None else max_new_tokens)
    given = options.pop("generation_config", None)
    options = checked_options(given, options | {"max_new_tokens": max_new_tokens})
    tails = [tail(split(processor, one), compressed.prompt) for one in text]
    inputs = over(model, processor, compressed, which, tails)
    n_copies = max(generate_option(name, options, given) or 1 for name in ("num_beams", "num_return_sequences"))
    if n_copies > 1:
        inputs["past_key_values"].batch_repeat_interleave(n_copies)
    with greedy(model):
        out = model.generate(**inputs, generation_config=given, **options)
    n_given = inputs["input_ids"].shape[1]
    if isinstance(out, Tensor):
        return [one.strip() for one in processor.tokenizer.batch_decode(out[:, n_given:], skip_special_tokens=True)]
    out.sequences = out.sequences[:, n_given:]
    return out


def checked_options(config: GenerationConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s options as transformers shall get them. ValueError, naming the option, for what cannot go over images."""
    options = {name: value for name, value in options.items() if value is not None}
    check_over_images((config,), options)
    for name in ("input_ids", "attention_mask", "pixel_values", "patch_features"):
        if name in options:
            raise ValueError(f"{name} cannot be given with compressed=..., which holds the image; give text=[...] only")
    own_cache(options, (config,), ("dynamic",))
    for name, other in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = generate_option(name, options, config)
        if value and generate_option(other, options, config) is None:
            raise ValueError(f"{name}={value} counts the prompt, of which the image is kept as entries; give {other}")
    return options if generate_option("max_new_tokens", options, config) is not None else options | {"max_new_tokens": 64}


# ---------------------------------------------------------------------------------------------------- models and methods
def own_bottleneck(model: Any) -> bool:
    """Has the model a bottleneck of its own?"""
    own = getattr(unwrapped(model).base_model, "compressor", None)
    return isinstance(own, Compressor) and bool(own.n_bottleneck)


def has_own_method(model: Any) -> bool:
    """Has the model a compressor of its own, with or without a bottleneck?"""
    own = getattr(model.base_model, "compressor", None)
    return isinstance(own, Compressor) and own.name != "none"


def method_of(
    model: Any, name: str, settings: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]:
    """What to write into the recipe, and the block to read images in. ValueError for methods that need the question."""
    if has_own_method(model):
        own = model.base_model.compressor
        if name != "none":
            raise ValueError(f"this model has compressor {own.name!r} of its own; leave out method={name!r}")
        check_independent(own)
        return {"name": OWN}, nullcontext
    check_method({"name": name, **settings})
    if name == "none":
        return {"name": "none"}, nullcontext
    return {"name": name, **settings}, lambda: apply(model, name, **settings)


def check_method(method: Mapping[str, Any]) -> None:
    """ValueError for {"name": ..., settings} that no stock model's images can be cached with; before a model is loaded."""
    name, settings = method["name"], {key: value for key, value in method.items() if key != "name"}
    if name == "none" and settings:
        raise ValueError(f"none keeps all tokens; leave out {', '.join(settings)}, or name a method that has a budget")
    cls: Any = COMPRESSORS.get(name)
    made = build(name) if "budget" in settings and "budget" not in fields_of(cls) else build(name, **settings)
    check_independent(made)


def fields_of(cls: Any) -> set[str]:
    """Names of a method's settings."""
    return set(getattr(cls.Settings, "__dataclass_fields__", {}))


def check_independent(method: Compressor) -> None:
    """ValueError for a method whose result differs with the question."""
    if not method.question_independent:
        known = [name for name in COMPRESSORS.own_names() if can_be_cached(COMPRESSORS.get(name))]
        raise ValueError(
            f"{method.name} chooses by the question, so what it keeps of an image cannot be shared by later questions; ask "
            f"inside `with htc_vlm.apply(model, {method.name!r}, ...)`, or cache one of: {', '.join(known)}"
        )


def can_be_cached(cls: Any) -> bool:
    """Does the method need no question and no training?"""
    return bool(cls.QUESTION_INDEPENDENT and not cls.TRAINED)


# ---------------------------------------------------------------------------------------------------------------- prompts
def split(processor: Any, text: str) -> Asked:
    """A question, or a whole prompt -> what stands before and after its image. ValueError for a second image."""
    mark = processor.image_token
    if mark not in text:
        if hasattr(processor, "question_ids"):  # ours: the ids that training gave
            ids = list(processor.question_ids(text))
            visual = processor.tokenizer.convert_tokens_to_ids(mark)
            first, behind = ids.index(visual), len(ids) - ids[::-1].index(visual)
            return Asked(ids[:first], ids[behind:], None, ids)
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"this processor has no chat template; give whole prompts with {mark} where the image stands, got {text!r}"
            )
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    if text.count(mark) != 1:
        raise ValueError(
            f"a prompt over cached images has one image, got {text.count(mark)} in {text!r}; give several pictures to "
            "model.generate with their pixels"
        )
    before, after = text.split(mark)
    ids_after = list(processor.tokenizer(mark + after, add_special_tokens=False)["input_ids"])[1:]  # as amid the prompt
    return Asked(list(processor.tokenizer(before, **begun(processor, text))["input_ids"]), ids_after, text, [])


def begun(processor: Any, text: str) -> dict[str, Any]:
    """The tokenizer's option for a text that begins with its BOS, as some templates write it: it adds no second one."""
    bos = getattr(processor.tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def read(model: Any, processor: Any, asked: Asked, image: Any, whole: bool = False) -> dict[str, Tensor]:
    """The processor's inputs for one prompt about one picture: `whole`, or up to its image and as `tail` the ids behind."""
    if asked.text is None:
        inputs = dict(processor(images=[image], return_tensors="pt"))
        inputs["input_ids"] = torch.tensor([asked.ids])
    else:
        inputs = dict(processor(images=[image], text=[asked.text], return_tensors="pt", **begun(processor, asked.text)))
    ids = inputs["input_ids"]
    is_visual = (ids[0] == model.config.image_token_id).nonzero()
    if not len(is_visual):
        raise ValueError("the processor wrote no visual token into the prompt; does its image token fit the model?")
    n = int(is_visual[-1]) + 1
    if not whole:
        inputs["tail"] = ids[:, n:]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, :n]
    kept = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else None) for name, x in kept.items()}


def marks_after(processor: Any, asked: Asked, inputs: dict[str, Tensor]) -> list[int]:
    """Ids that the processor writes between the last visual token and the prompt's own text."""
    given, own = inputs["tail"][0].tolist(), asked.after
    if given[len(given) - len(own) :] != own:
        raise ValueError(
            f"{type(processor).__name__} writes another text behind the image than the prompt's own ({given} and {own}); "
            "images of this processor cannot be cached"
        )
    return given[: len(given) - len(own)]


def tail(asked: Asked, prompt: Mapping[str, Any]) -> list[int]:
    """Ids behind the image of one prompt. ValueError where it does not begin as the cached ones."""
    if asked.before != list(prompt["prefix"]):
        raise ValueError(
            f"this prompt has the tokens {asked.before} before its image, the images were cached behind "
            f"{list(prompt['prefix'])}; compress them with prompt=... that begins like this one"
        )
    return [*prompt["after"], *asked.after]


def images_of(n_prompts: int, n_images: int, which: Sequence[int] | None) -> list[int]:
    """The image of each prompt."""
    if which is not None:
        if len(which) != n_prompts or not all(0 <= i < n_images for i in which):
            raise ValueError(f"which={list(which)} must name one of {n_images} images for each of {n_prompts} prompts")
        return list(which)
    if n_images not in (1, n_prompts):
        raise ValueError(f"{n_prompts} prompts and {n_images} images: give one image, one for each prompt, or `which`")
    return [0] * n_prompts if n_images == 1 else list(range(n_prompts))


# ------------------------------------------------------------------------------------------------------------------ caches
def entries(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """One prompt up to its image -> (1, layers, 2, kv heads, K, head_dim), and how many positions it takes."""
    given = {name: value for name, value in inputs.items() if name != "tail"}
    cache = model(**given, use_cache=True, logits_to_keep=1).past_key_values
    strange = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if strange:
        raise ValueError(f"this decoder keeps {', '.join(sorted(strange))}, of which a prefix cannot be cut out")
    n_entries = cache.get_seq_length()
    deltas = getattr(model.base_model, "rope_deltas", None)
    n_positions = n_entries if deltas is None else given["input_ids"].shape[1] + int(deltas[0])
    return hf_compat.kv_from_cache(cache, n_entries), n_positions


def over(
    model: Any, processor: Any, compressed: CompressedImages, which: list[int], tails: list[list[int]]
) -> dict[str, Any]:
    """generate's arguments: a cache that begins with the images, and left-padded text behind them.

    which: the image of each prompt; tails: the ids behind it. ValueError for images of another model, processor or method.
    """
    assert compressed.prompt is not None
    recipe = recipe_of(model, getattr(processor, "image_processor", None), extra={"prompt": dict(compressed.prompt)})
    compressed.check_made_by(recipe.digest)
    n_longest = max(compressed.n_visual[i] + len(row) for i, row in zip(which, tails, strict=True))
    check_context(model.config.get_text_config(), n_longest)
    embedding = model.get_input_embeddings().weight
    is_shared = len(set(which)) == 1
    kv = compressed[[which[0]] if is_shared else which].kv.to(embedding.device, embedding.dtype)
    batch, longest = len(tails), max(map(len, tails))
    n_entries = kv.shape[4]
    # Ids of entries that are there are looked at by penalties for what was said before only: they are the text before the
    # image, and where there is none words of the question, but no placeholder.
    prefix = list(compressed.prompt["prefix"])[:n_entries]
    ids = []
    for row in tails:
        filler = prefix[0] if prefix else row[-1]
        ids.append(prefix + [filler] * (n_entries - len(prefix) + longest - len(row)) + row)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tails], device=kv.device)
    begins = torch.tensor([compressed.n_visual[i] for i in which], device=kv.device)[:, None]
    return {
        "input_ids": torch.tensor(ids, device=kv.device),
        "attention_mask": torch.cat((mask.new_ones(batch, n_entries), mask), dim=1),
        "position_ids": begins + (mask.cumsum(dim=1) - 1).clamp(min=0),
        "past_key_values": hf_compat.cache_from_kv(kv[:, :, 0], kv[:, :, 1], batch, model.config.get_text_config()),
    }
