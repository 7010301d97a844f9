"""What generate may be asked for over images: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from htc_vlm.model.answering import Answerer

from .. import tiny_runs as tiny
from ..tinies import BOTTLENECK, IMAGE, N_PATCHES, batch, build, image_ids, pixels, shared

VOCO = {"name": "voco", "n_bottleneck": 3}
QUESTIONS = [[4, 5, *[BOTTLENECK] * 3, 6], [7, *[BOTTLENECK] * 3, 8, 9, 10]]


@pytest.mark.parametrize("where", ["argument", "config", "own config beside a given one"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prefill_chunk_size", 2), ("prompt_lookup_num_tokens", 2), ("assistant_model", build({"name": "none"})),
        ("use_cache", False),
    ],
)  # fmt: skip
def test_options_that_half_work_over_images_are_refused_by_name(option: str, value: Any, where: str) -> None:
    """Prompts in parts gave other logits, guessed tokens and no cache an error from the middle of the model."""
    model = build(VOCO)
    kv = model.compress(pixel_values=pixels(1))
    arguments: dict[str, Any] = {option: value}
    if where != "argument":
        if option == "assistant_model":
            pytest.skip("a model is no entry of a configuration")
        setattr(model.generation_config, option, value)
        arguments = {} if where == "config" else {"generation_config": GenerationConfig(do_sample=False)}
    ids = batch([[5, 6, 7]])
    with pytest.raises(ValueError, match=f"{option}=.*does not go with compressed images"):
        model.generate(**ids, compressed=kv, max_new_tokens=2, do_sample=False, **arguments)
    prompt = batch([[*image_ids(model), 6]])
    with pytest.raises(ValueError, match=f"{option}=.*does not go with compressed images"):
        model.generate(**prompt, pixel_values=pixels(1), max_new_tokens=2, do_sample=False, **arguments)
    if option == "use_cache":  # without an image there is nothing in the cache
        assert model.generate(**ids, max_new_tokens=2, do_sample=False, **arguments).shape == (1, 5)


def test_a_prompt_with_a_place_for_an_image_and_no_image_is_refused() -> None:
    """A forgotten compressed=... was answered from nothing, without a word."""
    model = shared(VOCO)
    for ids in ([[BOTTLENECK] * 3 + [6, 7]], [[IMAGE] * N_PATCHES + [BOTTLENECK] * 3 + [6, 7]]):
        with pytest.raises(ValueError, match="no image was given.*pixel_values=..., or compressed="):
            model.generate(**batch(ids), max_new_tokens=2)
    with pytest.raises(ValueError, match="bottleneck tokens and no image.*give compressed="):
        model(**batch([[BOTTLENECK] * 3 + [6, 7]]))
    for whole in (model, model.model, shared({"name": "avg_pool", "n_tokens": 4}).model):  # a forward pass answered, too
        with pytest.raises(ValueError, match="no image was given"):
            whole(**batch([[IMAGE] * N_PATCHES + [BOTTLENECK] * 3 + [6, 7]]))
    assert shared({"name": "none"})(**batch([[IMAGE] * N_PATCHES + [6, 7]])).logits.shape[1] == N_PATCHES + 2  # as LLaVA
    with pytest.raises(ValueError, match="no image was given"):
        shared({"name": "none"}).generate(**batch([[IMAGE] * N_PATCHES + [6, 7]]), max_new_tokens=2)
    assert model.generate(**batch([[6, 7]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


@pytest.mark.parametrize("how", ["argument", "config", "positional"])
@pytest.mark.parametrize("prompt", ["pixels", "kv", "kv without a place"])
def test_lengths_count_the_prompt_as_it_was_given(prompt: str, how: str) -> None:
    """576 placeholders run as one entry: max_length=n + 3 once gave 578 new tokens, and none where no place was marked."""
    model = shared(VOCO)
    ids = [6, 7, 8] if prompt == "kv without a place" else [*image_ids(model), 6, 7]
    if prompt == "kv":
        ids = ids[N_PATCHES:]
    inputs: dict[str, Any] = batch([ids])
    inputs |= {"pixel_values": pixels(1)} if prompt == "pixels" else {"compressed": model.compress(pixel_values=pixels(1))}
    lengths = {"max_length": len(ids) + 3, "min_length": len(ids) + 3}
    config = GenerationConfig(**lengths, do_sample=False, eos_token_id=list(range(4, 38)), pad_token_id=0)
    if how == "argument":
        out = model.generate(**inputs, **lengths, do_sample=False)
    elif how == "config":
        out = model.generate(**inputs, generation_config=config)
    else:
        out = model.generate(inputs.pop("input_ids"), config, **inputs)
    assert out.shape == (1, len(ids) + 3) and out[0, : len(ids)].tolist() == ids
    assert config.max_length == len(ids) + 3
    with pytest.raises(ValueError, match=f"max_length is 2, the prompt alone has {len(ids)} tokens"):
        model.generate(**{**inputs, **batch([ids])}, max_length=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"max_cache_len": 40}], ids=str)
def test_a_static_cache_reads_images_amid_the_text_as_a_dynamic_one(options: dict[str, int], attention: str) -> None:
    """LLaVA's order has the system prompt before the image; prompts of unlike lengths, two images in one of them."""
    model = shared(VOCO, attention)
    kv = model.compress(pixel_values=pixels(3))
    prompts = [[4, *[BOTTLENECK] * 3, 11, *[BOTTLENECK] * 3, 12], QUESTIONS[1]]
    n_new = 3
    given: dict[str, Any] = {**batch(prompts), "compressed": kv, "max_new_tokens": n_new, "do_sample": False}
    given |= {"return_dict_in_generate": True, "output_logits": True, **options}
    dynamic = model.generate(**{k: v for k, v in given.items() if k != "max_cache_len"})
    static = model.generate(**given, cache_implementation="static")
    torch.testing.assert_close(static.logits[0], dynamic.logits[0], atol=1e-4, rtol=0)
    assert static.sequences.equal(dynamic.sequences)
    assert torch.isfinite(static.logits[0]).all()


@pytest.mark.parametrize("method", ["none", "voco"])
@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 5, "length_penalty": 5.0}, {"repetition_penalty": 30.0}, {"min_new_tokens": 4},
        {"num_return_sequences": 2, "num_beams": 2}, {"bad_words_ids": [[i] for i in range(5, 20)]}, {"do_sample": True},
        {"no_repeat_ngram_size": 1, "max_length": 4096}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_a_checkpoint_s_generation_config_does_not_change_greedy_answers(own: dict[str, Any], method: str) -> None:
    """`num_return_sequences: 2` gave the second question the first one's other answer."""
    model, processor = tiny.loaded({"none": tiny.NONE, "voco": tiny.VOCO}[method])
    questions = [*tiny.QUESTIONS, "what colour is behind the bottom left ?"]
    answerer, picture = Answerer(model, processor), tiny.noise(1)
    expected = answerer.answer("a", lambda: picture, questions, 4)
    assert any(expected)
    before = model.generation_config
    changed = GenerationConfig(**{**before.to_dict(), **own})
    try:
        model.generation_config = changed
        assert answerer.answer("b", lambda: picture, questions, 4) == expected
        assert model.generation_config is changed
    finally:
        model.generation_config = before


@pytest.mark.parametrize("kind", ["dynamic", "static", "hybrid"])
@pytest.mark.parametrize("where", ["own", "given", "own beside a given one"])
def test_a_configuration_may_name_the_cache(where: str, kind: str) -> None:
    """Only the argument was read: transformers then refused our cache beside its own. `hybrid` it drops by itself."""
    model = build(VOCO)
    given: dict[str, Any] = {**batch([QUESTIONS[0]]), "compressed": model.compress(pixel_values=pixels(1)), "do_sample": False}
    expected = model.generate(**given, max_new_tokens=3)
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    (config if where == "given" else model.generation_config).cache_implementation = kind
    options: dict[str, Any] = {"max_new_tokens": 3} if where == "own" else {"generation_config": config}
    assert model.generate(**given, **options).equal(expected)
    with pytest.raises(ValueError, match="cache_implementation is 'quantized'; over compressed images: 'dynamic', 'static'"):
        model.generate(**given, generation_config=GenerationConfig(cache_implementation="quantized"))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_checkpoint_s_own_lengths_count_as_given_ones(cache: str) -> None:
    """Its max_new_tokens wins over the max_length of a call, for which a static cache had no room: IndexError."""
    model = build(VOCO)
    prompt = [*image_ids(model), 6, 7]
    given: dict[str, Any] = {**batch([prompt]), "pixel_values": pixels(1), "cache_implementation": cache, "do_sample": False}
    model.generation_config.update(max_new_tokens=12, min_new_tokens=12, eos_token_id=list(range(4, 38)), pad_token_id=0)
    assert model.generate(**given, max_length=len(prompt) + 3).shape == (1, len(prompt) + 12)
    model.generation_config.update(max_new_tokens=None, min_new_tokens=None, min_length=len(prompt) + 3)
    model.generation_config.max_length = len(prompt) + 3
    assert model.generate(**given).shape == (1, len(prompt) + 3)


def test_a_checkpoint_s_own_beams_count_beside_a_given_configuration() -> None:
    """The images' kv was for one row, and transformers made two."""
    model = build(VOCO)
    given: dict[str, Any] = {**batch([QUESTIONS[0]]), "compressed": model.compress(pixel_values=pixels(1))}
    expected = model.generate(**given, num_beams=2, max_new_tokens=3, do_sample=False)
    model.generation_config.num_beams = 2
    assert model.generate(**given, generation_config=GenerationConfig(max_new_tokens=3, do_sample=False)).equal(expected)


def test_what_images_decide_cannot_be_given_beside_them() -> None:
    """Positions, embeddings and features were dropped without a word, or ended in a TypeError."""
    model = shared(VOCO)
    given: dict[str, Any] = {**batch([QUESTIONS[0]]), "compressed": model.compress(pixel_values=pixels(1))}
    for name in ("position_ids", "inputs_embeds", "patch_features"):
        value = torch.zeros(1, 6, 1) if name == "inputs_embeds" else torch.zeros(1, 6, dtype=torch.long)
        with pytest.raises(ValueError, match=f"leave out {name}"):
            model(**given, **{name: value})
        with pytest.raises(ValueError, match=name):
            model.generate(**given, **{name: value}, max_new_tokens=2)
    with pytest.raises(ValueError, match="image_codes.* not both"):
        model.generate(**given, image_codes=torch.zeros(1), max_new_tokens=2)


def test_fused_answers_need_a_cache() -> None:
    """Without one every answer token was fused with the picture in the next step: other logits from the second on."""
    model = shared({"name": "llava_mini", "n_fusion": 1})
    with pytest.raises(ValueError, match="use_cache=False does not go with llava_mini"):
        model.generate(**batch([[IMAGE, 6, 7]]), pixel_values=pixels(1), use_cache=False, max_new_tokens=2)
