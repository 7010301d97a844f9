"""`htc_vlm.apply` on a stock LLaVA: what must hold for every method that it applies."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import htc_vlm
from htc_vlm import HtcVlmConfig, HtcVlmForConditionalGeneration, compressors, load
from htc_vlm.compressors import COMPRESSORS, AppliedOnly

N_NEW = 5
INSIDE = {
    "fastv": {"n_keep": 5, "layer": 2},
    "pyramid_drop": {"stages": (1, 3, 5), "ratio": 0.5},
    "sparse_vlm": {"layers": (1, 3), "keep": (7, 3)},
    "sparse_vlm+": {"layers": (1, 3), "keep": (7, 3), "plus": True, "n_heads": 2},
}
BEFORE = {
    "random_drop": {"n_keep": 5},
    "avg_pool": {"n_tokens": 4},
    "divprune": {"n_keep": 6},
    "downsample": {"n_tokens": 4},
    "tome": {"n_keep": 5},
    "tome+": {"n_keep": 5, "place": "after_tower"},
    "visionzip": {"n_dominant": 4, "n_contextual": 2},
}
ALL = {**INSIDE, **BEFORE}
KEEP_ALL = [
    ("none", {}),
    ("fastv", {"n_keep": 16, "layer": 2}),
    ("pyramid_drop", {"stages": (1, 3), "ratio": 1.0}),
    ("sparse_vlm", {"layers": (1, 3), "keep": (16, 16)}),
    ("sparse_vlm", {"layers": (1, 3), "keep": (16, 16), "plus": True, "n_heads": 2}),
    ("random_drop", {"n_keep": 16}),
    ("avg_pool", {"n_tokens": 16, "place": "after_projector"}),
    ("avg_pool", {"n_tokens": 16}),
    ("divprune", {"n_keep": 16}),
    ("tome", {"merges": (0, 0, 0)}),
    ("tome", {"n_keep": 16, "place": "after_tower"}),
]
EXAMPLES = [  # of every method that only `apply` can run: a new one is tested as soon as it is registered
    (name, example)
    for name in compressors.names()
    if issubclass(COMPRESSORS.get(name), AppliedOnly)
    for example in COMPRESSORS.get(name).EXAMPLES
]
both = pytest.mark.parametrize("attention", ["sdpa", "eager"])
inside = pytest.mark.parametrize("case", INSIDE)
every = pytest.mark.parametrize("case", ALL)


def applied(model: Any, case: str) -> Any:
    return htc_vlm.apply(model, case.rstrip("+"), **ALL[case])


def answer(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=N_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@both
@every
def test_cached_generation_is_uncached_recomputation(llavas: Any, prompts: Any, attention: str, case: str) -> None:
    """Decoding over layers of different lengths: wrong positions or masks show only after the first new token."""
    model, batch = llavas[attention], prompts.batch
    n_prompt = batch["input_ids"].shape[1]
    with applied(model, case):
        out = answer(model, batch)
        for step, logits in enumerate(out.logits):
            ids = out.sequences[:, : n_prompt + step]
            mask = torch.cat((batch["attention_mask"], torch.ones(3, step, dtype=torch.long)), dim=1)
            extra = {"prompt_length": n_prompt} if case in INSIDE else {}
            again = model(ids, attention_mask=mask, pixel_values=batch["pixel_values"], use_cache=False, **extra)
            close(again.logits[:, -1], logits)


@both
@pytest.mark.parametrize(("name", "settings"), [*EXAMPLES, *((case.rstrip("+"), ALL[case]) for case in ALL)])
def test_generation_without_a_cache_gives_the_same(
    llavas: Any, prompts: Any, attention: str, name: str, settings: dict[str, Any]
) -> None:
    """Without a cache the prompt is read anew with each token: the answer's last token chose the patches, not the question."""
    model = llavas[attention]
    with htc_vlm.apply(model, name, **settings) as run:
        cached = answer(model, prompts.batch)
        assert run.schedule == run.method.schedule(16, 6)
        anew = answer(model, prompts.batch, use_cache=False)
        alone = answer(model, prompts.one(1))
    assert torch.equal(cached.sequences, anew.sequences)
    close(torch.stack(cached.logits), torch.stack(anew.logits))
    close(torch.stack(cached.logits)[:, 1], torch.stack(alone.logits)[:, 0])


@inside
def test_right_padding_gives_what_the_samples_give(llava: Any, prompts: Any, case: str) -> None:
    """`apply` promises logits that are left-padded, however the prompts came."""
    longest = prompts.batch["input_ids"].shape[1]
    ids = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for ids in prompts.samples])
    mask = torch.stack([torch.arange(longest) < len(ids) for ids in prompts.samples]).long()
    with applied(llava, case):
        batch = llava(ids, attention_mask=mask, pixel_values=prompts.batch["pixel_values"]).logits
        for i in range(3):
            close(batch[i, -1], llava(**prompts.one(i)).logits[0, -1])


@pytest.fixture
def two_dimensional() -> Any:
    """The name of an attention backend that, like flash attention, gets 2-D masks, and that minds what it gets."""
    name, scaled = "two_dimensional", torch.nn.functional.scaled_dot_product_attention

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
        assert attention_mask is None or attention_mask.ndim == 2
        assert kwargs.get("position_ids") is None  # flash takes gaps in them for the ends of packed sequences
        n_query, n_key = query.shape[2], key.shape[2]
        visible = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, -n_key:].bool()
        visible = visible | ~visible.any(dim=-1, keepdim=True)  # padding looks somewhere
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return scaled(query, key, value, attn_mask=visible, scale=scaling).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, flash_attention_mask)
    yield name
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name)


@inside
def test_a_backend_that_takes_no_masks_of_ours_gives_the_same(
    new_llava: Any, llavas: Any, prompts: Any, two_dimensional: str, case: str
) -> None:
    """Flash attention stays usable: layers get a 2-D mask and no positions, prefill and decoding."""
    model = new_llava()
    model.set_attn_implementation({"text_config": two_dimensional})
    with applied(model, case), applied(llavas["sdpa"], case):
        close(torch.stack(answer(model, prompts.batch).logits), torch.stack(answer(llavas["sdpa"], prompts.batch).logits))


@inside
def test_who_chooses_matters(llava: Any, prompts: Any, case: str) -> None:
    """If the answer's tokens chose the patches, the test above would compare nothing: its `prompt_length` must act."""
    with applied(llava, case) as run:
        sources = []
        for n_prompt in (None, prompts.batch["input_ids"].shape[1] - 1):
            llava(**prompts.batch, prompt_length=n_prompt)
            sources.append(run.source)
    assert not torch.equal(*sources)


@both
@every
def test_a_left_padded_batch_gives_what_its_samples_give(llavas: Any, prompts: Any, attention: str, case: str) -> None:
    """The released codes read sample 0 only; here one sample has two images and all have different lengths."""
    model = llavas[attention]
    with applied(model, case):
        batch = answer(model, prompts.batch)
        for i in range(3):
            one = answer(model, prompts.one(i))
            assert torch.equal(one.sequences[0, -N_NEW:], batch.sequences[i, -N_NEW:])
            for alone, together in zip(one.logits, batch.logits, strict=True):
                close(alone[0], together[i])


@every
def test_sdpa_and_eager_agree(llavas: Any, prompts: Any, case: str) -> None:
    """A mask in the form that one backend ignores."""
    outs = []
    for model in llavas.values():
        with applied(model, case):
            outs.append(torch.stack(answer(model, prompts.batch).logits))
    close(*outs)


@every
def test_beams_are_those_of_one_sample(llavas: Any, prompts: Any, case: str) -> None:
    """Beams reorder the cache; what we know of it must not be left behind."""
    model = llavas["sdpa"]
    with applied(model, case):
        batch = answer(model, prompts.batch, num_beams=3, num_return_sequences=2).sequences
        one = answer(model, prompts.one(1), num_beams=3, num_return_sequences=2).sequences
        anew = answer(model, prompts.batch, num_beams=3, num_return_sequences=2, use_cache=False).sequences
    assert torch.equal(batch, anew)
    assert batch.shape[0] == 6
    assert torch.equal(batch[2:4, -N_NEW:], one[:, -N_NEW:])


@both
@pytest.mark.parametrize(("name", "settings"), KEEP_ALL)
def test_keeping_everything_is_the_stock_model(
    llavas: Any, prompts: Any, attention: str, name: str, settings: dict[str, Any]
) -> None:
    """The mechanism itself must cost nothing."""
    model = llavas[attention]
    plain = answer(model, prompts.batch)
    with htc_vlm.apply(model, name, **settings):
        kept = answer(model, prompts.batch)
    assert torch.equal(plain.sequences, kept.sequences)
    close(torch.stack(plain.logits), torch.stack(kept.logits))


def traces(model: Any) -> list[Any]:
    """Everything that a block could leave behind: classes, hooks, attributes, configuration."""
    found: list[Any] = [model.config.to_json_string()]
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        found.append((name, type(module), hooks, sorted(module.__dict__)))
    return found


@pytest.mark.parametrize("fails", [False, True])
@every
def test_afterwards_the_model_is_bit_identical(llavas: Any, prompts: Any, case: str, fails: bool) -> None:
    """Monkeypatches outlive their experiment; here also when it dies half-way."""
    model = llavas["sdpa"]
    plain = answer(model, prompts.batch)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = traces(model)
    random_state = torch.get_rng_state()
    try:
        with applied(model, case):
            answer(model, prompts.batch)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(random_state, torch.get_rng_state())
    assert traces(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = answer(model, prompts.batch)
    assert torch.equal(plain.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits, strict=True))


@every
def test_an_exception_in_the_middle_of_a_layer_leaves_nothing(new_llava: Any, prompts: Any, case: str) -> None:
    """Out of memory comes there, on a model that has answered nothing yet; then a smaller batch is tried."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    model, stock = new_llava(), new_llava()
    for tried, block in ((model, applied(model, case)), (stock, nullcontext())):
        layer = tried.model.language_model.layers[3]
        layer.forward = fail
        with pytest.raises(MemoryError), block:
            tried(**prompts.batch)
        del layer.forward
    assert traces(model) == traces(stock)  # transformers' own hooks, which its first call adds, included
    assert torch.equal(model(**prompts.batch).logits, stock(**prompts.batch).logits)


@every
def test_the_measured_schedule_is_the_promise(llava: Any, prompts: Any, case: str) -> None:
    """Published budgets were compared by promise only; SparseVLM's 64 is 82."""
    with applied(llava, case) as run:
        assert run.schedule is None
        out = answer(llava, prompts.one(0))
    assert run.schedule == run.method.schedule(16, 6)
    n_text = len(prompts.samples[0]) - 16 + N_NEW - 1
    assert [layer.keys.shape[2] - n_text for layer in out.past_key_values.layers] == run.schedule


def test_a_broken_promise_is_an_error(llava: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule in a table that no run had."""
    from htc_vlm.compressors.fastv import FastV

    monkeypatch.setattr(FastV, "schedule", lambda *_: [16, 16, 4, 4, 4, 4])
    with applied(llava, "fastv"), pytest.raises(ValueError, match=r"promised the schedule \[16, 16, 4"):
        llava(**prompts.batch)
    from htc_vlm.compressors.divprune import DivPrune

    monkeypatch.setattr(DivPrune, "before_llm", lambda _, images: images.patches[:, :7])
    with applied(llava, "divprune"), pytest.raises(ValueError, match="divprune promised 6 visual tokens and gave 7"):
        llava(**prompts.batch)


@inside
def test_asking_for_attention_maps_changes_nothing(llava: Any, prompts: Any, case: str) -> None:
    """Maps of later layers are smaller, and the answer the same."""
    with applied(llava, case) as run:
        plain = llava(**prompts.one(0)).logits
        asked = llava(**prompts.one(0), output_attentions=True, output_hidden_states=True)
    assert torch.equal(plain, asked.logits)
    n_text = len(prompts.samples[0]) - 16
    assert [maps.shape[-1] - n_text for maps in asked.attentions] == run.schedule
    assert [states.shape[1] - n_text for states in asked.hidden_states[1:]] == run.schedule


@every
def test_half_precision_works(new_llava: Any, prompts: Any, case: str) -> None:
    """Scores, sizes and means are float32; what they are given and what they give back is not."""
    model = new_llava().to(torch.bfloat16)
    inputs = {**prompts.batch, "pixel_values": prompts.batch["pixel_values"].bfloat16()}
    with applied(model, case):
        out = answer(model, inputs)
    assert all(bool(logits.isfinite().any(dim=-1).all()) for logits in out.logits)


@inside
def test_several_new_tokens_at_once_continue_the_cache(llava: Any, prompts: Any, case: str) -> None:
    """The next turn of a conversation: its tokens see each other causally and what is left of the image."""
    inputs, more = prompts.one(0), torch.tensor([[5, 6, 7]])
    with applied(llava, case):
        first = llava(**inputs, use_cache=True)
        second = llava(more, past_key_values=first.past_key_values)
        ids = torch.cat((inputs["input_ids"], more), dim=1)
        whole = llava(ids, pixel_values=inputs["pixel_values"], prompt_length=ids.shape[1] - 3)
    close(second.logits[0], whole.logits[0, -3:])


@inside
def test_samples_without_an_image_are_left_alone(llava: Any, prompts: Any, case: str) -> None:
    """A batch may mix questions about pictures with others."""
    ids, mask = prompts.batch["input_ids"].clone(), prompts.batch["attention_mask"].clone()
    ids[1], mask[1] = 0, 0
    ids[1, -4:], mask[1, -4:] = torch.tensor([1, 20, 21, 22]), 1
    pixels = torch.cat((prompts.pixels[0], prompts.pixels[2]))
    plain = llava(ids[1:2, -4:]).logits[0, -1]
    with applied(llava, case):
        mixed = llava(ids, attention_mask=mask, pixel_values=pixels).logits
        alone = llava(ids[1:2, -4:]).logits[0, -1]
        with_image = llava(**prompts.one(0)).logits[0, -1]
    close(mixed[1, -1], plain)
    assert torch.equal(alone, plain)
    close(mixed[0, -1], with_image)


@pytest.mark.parametrize("case", BEFORE)
def test_prompts_come_back_as_they_were_given(llavas: Any, prompts: Any, case: str) -> None:
    """The stock processor makes 576 placeholders; who decodes the answer slices off that many."""
    without_ids = {name: value for name, value in prompts.batch.items() if name != "input_ids"}
    with applied(llavas["sdpa"], case):
        ids = llavas["sdpa"].generate(**prompts.batch, max_new_tokens=2, do_sample=False)
        by_length = llavas["sdpa"].generate(**prompts.batch, max_length=ids.shape[1], do_sample=False)
        config = GenerationConfig(**{**llavas["sdpa"].generation_config.to_dict(), "max_length": ids.shape[1]})
        by_config = llavas["sdpa"].generate(**prompts.batch, generation_config=config, do_sample=False)
        by_place = llavas["sdpa"].generate(prompts.batch["input_ids"], config, **without_ids, do_sample=False)
    assert torch.equal(ids[:, :-2], prompts.batch["input_ids"])
    assert torch.equal(ids, by_length) and torch.equal(ids, by_config) and torch.equal(ids, by_place)
    assert config.max_length == ids.shape[1]  # the caller's own stays as it was


@pytest.mark.parametrize("case", BEFORE)
def test_prompts_may_have_the_right_number_of_placeholders(llava: Any, prompts: Any, case: str) -> None:
    """A processor that knows the method makes C placeholders."""
    inputs = prompts.one(0)
    ids = inputs["input_ids"][0]
    with applied(llava, case) as run:
        n_keep = run.method.n_visual(16)
        first = int((ids == 50).nonzero()[0])
        short = torch.cat((ids[: first + n_keep], ids[first + 16 :]))[None]
        close(llava(short, pixel_values=inputs["pixel_values"]).logits, llava(**inputs).logits)
        with pytest.raises(ValueError, match="takes 16 for each"):
            llava(ids[ids != 50][None], pixel_values=inputs["pixel_values"])


def test_labels_follow_a_recut_prompt_and_are_refused_inside(llava: Any, prompts: Any) -> None:
    """A loss against labels that have slipped by 571 places."""
    ids = prompts.samples[0]
    labels = torch.where(torch.arange(len(ids)) >= len(ids) - 2, ids, -100)[None]
    with applied(llava, "random_drop"):
        out = llava(**prompts.one(0), labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[0, -3:-1], ids[-2:])
    close(out.loss, expected)
    with applied(llava, "fastv"), pytest.raises(ValueError, match="loss from the logits"):
        llava(**prompts.one(0), labels=labels)


@pytest.mark.parametrize("case", ["fastv", "pyramid_drop", "sparse_vlm", "divprune", "avg_pool"])
def test_our_own_model_works_too_with_features_computed_before(new_llava: Any, prompts: Any, case: str) -> None:
    """Evaluation runs the vision tower once per picture and hands over its features."""
    stock = new_llava()
    config = HtcVlmConfig(**{k: v for k, v in stock.config.to_dict().items() if k != "model_type"})
    model = HtcVlmForConditionalGeneration(config).eval()
    model.load_state_dict(stock.state_dict())
    model.generation_config = stock.generation_config
    with applied(stock, case):
        expected = answer(stock, prompts.batch)
    inputs = dict(prompts.batch)
    with applied(model, case):
        close(torch.stack(answer(model, inputs).logits), torch.stack(expected.logits))
        features = model.model.vision_features(pixel_values=inputs.pop("pixel_values"))
        out = answer(model, {**inputs, "patch_features": features})
    close(torch.stack(out.logits), torch.stack(expected.logits))
    assert torch.equal(out.sequences, expected.sequences)


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
}


@pytest.mark.parametrize("text", [MistralConfig(**TEXT, sliding_window=None), Qwen2Config(**TEXT)])
def test_other_decoders_of_llavas_work(new_llava: Any, prompts: Any, text: Any) -> None:
    """BakLLaVA is a Mistral, LLaVA-Interleave a Qwen2."""
    model = new_llava(text_config=text.to_dict())
    plain = answer(model, prompts.batch)
    with htc_vlm.apply(model, "fastv", n_keep=16, layer=2):
        close(torch.stack(answer(model, prompts.batch).logits), torch.stack(plain.logits))
    with applied(model, "pyramid_drop"):
        batch = answer(model, prompts.batch).logits[-1]
        close(batch[1], answer(model, prompts.one(1)).logits[-1][0])


def own_config(compressor: dict[str, Any]) -> HtcVlmConfig:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(**TEXT)
    return HtcVlmConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=50, compressor=compressor)


def refused(model: Any, message: str, name: str, **settings: Any) -> None:
    before = traces(model)
    with pytest.raises(ValueError, match=message), htc_vlm.apply(model, name, **settings):
        raise AssertionError("entered")
    assert traces(model) == before


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fastv", {"n_keep": 17, "layer": 2}, "n_keep is 17; there are only 16"),
        ("fastv", {"n_keep": 4, "layer": 6}, "the model has 6"),
        ("fastv", {"n_kept": 4}, "known: n_keep, layer"),
        ("pyramid_drop", {}, "the model has 6"),
        ("sparse_vlm", {"budget": 64}, "576 patches and 32 layers"),
        ("visionzip", {}, "there are 16"),
        ("divprune", {"n_keep": 17}, "only 16"),
        ("random_drop", {"n_keep": 17}, "only 16"),
        ("avg_pool", {"n_tokens": 25}, "only 16"),
        ("tome", {}, "only 16"),
        ("tome", {"n_keep": 17}, "n_keep is 17; there are only 16"),
        ("tome", {"merges": (2, 2)}, "one for each of the 3 blocks"),
        ("tome", {"merges": (9, 0, 0)}, "block 0 is asked to merge 9 of 16"),
        ("tome", {"n_keep": 1}, "n_keep must be at least 2"),
        ("pyramid_drop", {"stages": (2, 6)}, "the model has 6"),
        ("pyramid_drop", {"stages": (2,), "ratio": 1.5}, "at most 1"),
        ("pyramid_drop", {"stages": (2,), "ratio": 0.01}, "cannot keep 0 of 16"),
        ("sparse_vlm", {"layers": (1,), "keep": (17,)}, "cannot keep 17 of 16"),
        ("sparse_vlm", {"layers": (5,), "keep": (4,)}, "the model has 6"),
        ("sparse_vlm", {"layers": (1,), "keep": (4,), "plus": True}, "n_heads is 14; the model has 4"),
        ("visionzip", {"n_dominant": 16, "n_contextual": 2}, "need 17 patches; there are 16"),
        ("voco", {}, "must be trained"),
        ("qformer", {}, "must be trained"),
        ("htc", {}, "must be trained"),
        ("llava_mini", {}, "must be trained"),
        ("fastvlm", {}, "unknown compressor 'fastvlm'; known: avg_pool"),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(llava: Any, name: str, settings: dict[str, Any], message: str) -> None:
    """Before anything is changed, not in the middle of an evaluation."""
    refused(llava, message, name, **settings)


def test_models_that_lack_what_a_method_needs_are_refused(new_llava: Any) -> None:
    """SigLIP has no class token; a sliding window has a mask of its own."""
    siglip = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = new_llava(vision_config=siglip.to_dict(), vision_feature_select_strategy="full")
    refused(model, "needs a CLIP vision tower", "visionzip", n_dominant=4, n_contextual=2)
    refused(model, "needs a CLIP vision tower", "tome", n_keep=4)
    model = new_llava(text_config=MistralConfig(**TEXT, sliding_window=8).to_dict())
    refused(model, "sliding-window", "fastv", n_keep=4, layer=2)
    refused(new_llava(vision_feature_layer=[-2, -3]), "patches of one layer", "tome", n_keep=4)
    with pytest.raises(ValueError, match="got Linear"), htc_vlm.apply(torch.nn.Linear(2, 2), "fastv"):
        pass


def test_applying_twice_and_over_a_compressor_is_refused(llava: Any) -> None:
    """Two methods at once have no schedule."""
    with applied(llava, "fastv"):
        refused(llava, "fastv is applied", "divprune", n_keep=4)
    config = own_config({"name": "divprune", "n_keep": 4})
    refused(HtcVlmForConditionalGeneration(config), "compressor 'divprune' of its own", "fastv")


def test_a_model_cannot_have_an_applied_method_as_its_compressor() -> None:
    """It would run without dropping anything, and call itself FastV."""
    config = own_config({"name": "fastv"})
    with pytest.raises(ValueError, match="use `with htc_vlm.apply"):
        HtcVlmForConditionalGeneration(config)


def test_caches_that_cannot_hold_layers_of_different_length_are_refused(llava: Any, prompts: Any) -> None:
    """A static cache, a copied one, a half-filled one: silently wrong otherwise."""
    inputs = prompts.one(0)
    with applied(llava, "fastv"):
        with pytest.raises(ValueError, match="DynamicCache"):
            llava(**inputs, past_key_values=StaticCache(llava.config.text_config, max_cache_len=64), use_cache=True)
        with pytest.raises(ValueError, match="cache_implementation='static'"):
            llava.generate(**inputs, max_new_tokens=1, cache_implementation="static")
        pruned = llava(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="give the whole conversation"):
            llava(**inputs, past_key_values=pruned)
    with applied(llava, "fastv"), pytest.raises(ValueError, match="continue inside the `with` block"):
        llava(torch.tensor([[5]]), past_key_values=pruned)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 2},
        {"prefill_chunk_size": 8},
        {"cache_implementation": "static"},
    ],
)
def test_guessing_ahead_and_reading_in_parts_are_refused(llava: Any, new_llava: Any, prompts: Any, options: Any) -> None:
    """A guessed token would choose the patches, and a rejected one would stay in what is known of the cache."""
    message = f"does not go with {next(iter(options))}"
    with applied(llava, "fastv"):
        with pytest.raises(ValueError, match=message):
            llava.generate(**prompts.one(0), max_new_tokens=1, **options)
        with pytest.raises(ValueError, match=message):
            llava.generate(**prompts.one(0), generation_config=GenerationConfig(max_new_tokens=1, **options))
    model = new_llava()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    with applied(model, "fastv"), pytest.raises(ValueError, match=message):
        model.generate(**prompts.one(0), max_new_tokens=1)


def test_calls_that_the_methods_cannot_take_are_refused_by_name(llava: Any, prompts: Any) -> None:
    """A mask, numbering or embedding that is silently not used."""
    inputs = prompts.one(0)
    n = inputs["input_ids"].shape[1]
    embeds, ids = llava.get_input_embeddings()(inputs["input_ids"]), torch.tensor([[1, 50, 50, 50, 7]])
    two = torch.cat((prompts.pixels[0], prompts.pixels[2]))
    calls: list[tuple[str, dict[str, Any], str]] = [
        ("fastv", {"attention_mask": torch.ones(1, 1, n, n)}, "fastv masks by itself; give a 2-D attention_mask, got 4-D"),
        ("fastv", {"input_ids": None, "inputs_embeds": embeds}, "give input_ids, not embeddings"),
        ("fastv", {"input_ids": ids, "pixel_values": two}, "3 image placeholders for 2 images"),
        ("divprune", {"input_ids": ids, "pixel_values": two}, "3 image placeholders for 2 images"),
        ("divprune", {"position_ids": torch.arange(n)[None]}, "cuts the prompt; leave out position_ids"),
        ("divprune", {"image_sizes": torch.tensor([[56, 56]])}, "images of different sizes"),
    ]
    for case, changes, message in calls:
        with applied(llava, case), pytest.raises(ValueError, match=message):
            llava(**{**inputs, **changes})
    with applied(llava, "divprune"), pytest.raises(ValueError, match="leave position_ids to generate"):
        llava.generate(**inputs, position_ids=torch.arange(n)[None], max_new_tokens=1)
    own = HtcVlmForConditionalGeneration(own_config({"name": "none"})).eval()
    with applied(own, "visionzip"), pytest.raises(ValueError, match="visionzip acts in the vision tower; give pixel_values"):
        own(inputs["input_ids"], patch_features=torch.zeros(1, 16, 16))


def test_a_tower_without_a_class_token_has_no_patch_too_many() -> None:
    """`full` once counted a class token for every tower, so 37 of tiny-upper's 36 patches were accepted."""
    model, _ = load("tiny-upper")
    with (
        pytest.raises(ValueError, match="n_keep is 37; there are only 36"),
        htc_vlm.apply(model, "random_drop", n_keep=37),
    ):
        pass
