"""`htc_vlm.apply` on a stock LLaVA: the same answers, however they are computed, for every method that it applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import htc_vlm

from .applying import INSIDE, N_NEW, answer, applied, both, close, every, inside

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
@every
def test_generation_without_a_cache_gives_the_same(llavas: Any, prompts: Any, attention: str, case: str) -> None:
    """Without a cache the prompt is read anew with each token: the answer's last token chose the patches, not the question."""
    model = llavas[attention]
    with applied(model, case) as run:
        cached = answer(model, prompts.batch)
        assert run.schedule == run.method.schedule(16, 6)
        anew = answer(model, prompts.batch, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    close(torch.stack(cached.logits), torch.stack(anew.logits))


@every
def test_a_left_padded_batch_gives_what_its_samples_give(llavas: Any, prompts: Any, case: str) -> None:
    """The released codes read sample 0 only; here one sample has two images and all have different lengths. That the batch is
    the same on eager is asked below."""
    model = llavas["sdpa"]
    with applied(model, case):
        batch = answer(model, prompts.batch)
        for i in range(3):
            one = answer(model, prompts.one(i))
            assert torch.equal(one.sequences[0, -N_NEW:], batch.sequences[i, -N_NEW:])
            for alone, together in zip(one.logits, batch.logits, strict=True):
                close(alone[0], together[i])


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


@every
def test_half_precision_works(new_llava: Any, prompts: Any, case: str) -> None:
    """Scores, sizes and means are float32; what they are given and what they give back is not."""
    model = new_llava().to(torch.bfloat16)
    inputs = {**prompts.batch, "pixel_values": prompts.batch["pixel_values"].bfloat16()}
    with applied(model, case):
        out = answer(model, inputs)
    assert all(bool(logits.isfinite().any(dim=-1).all()) for logits in out.logits)
