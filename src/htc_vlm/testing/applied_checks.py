"""What a method promises when `htc_vlm.apply` runs it on a model. Each docstring names the fault that the check prevents."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from htc_vlm.applied.apply import apply
from htc_vlm.testing import families, tiny_llava
from htc_vlm.testing.cases import Case
from htc_vlm.testing.tiny_llava import IMAGE, N_IMAGES, N_LAYERS, N_PATCHES, assert_close, batch, pixels, rows


def _inputs(case: Case) -> dict[str, Tensor]:
    return {**batch(rows(case.host)), "pixel_values": pixels(3)}


def _answer(model: Any, inputs: dict[str, Tensor], n_new: int = 3, **options: Any) -> Any:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, max_new_tokens=n_new, **options)


def the_schedule_is_what_happened_when_applied(case: Case) -> None:
    """A method that reports fewer tokens than its layers see gets its place in the cost tables for nothing."""
    with apply(case.host, **case.compressor) as run:
        logits = case.host(**batch([[4, *[IMAGE] * N_PATCHES, 5, 6]]), pixel_values=pixels(1)).logits
        promised = run.method.schedule(N_PATCHES, N_LAYERS)
        assert run.schedule == promised, f"promised {promised}, ran {run.schedule}"
    assert bool(torch.isfinite(logits).all())


def the_model_is_what_it_was_afterwards(case: Case) -> None:
    """A hook, class or weight that stays behind changes every later result without a word."""
    model, inputs = case.host, _inputs(case)
    before = model(**inputs).logits
    kinds = [type(module) for module in model.modules()]
    keys = [sorted(vars(module)) for module in model.modules()]
    torch.rand(1)  # a state that no seed gives
    state = torch.random.get_rng_state(), random.getstate()
    with apply(model, **case.compressor):
        first = model(**inputs).logits
        assert model(**inputs).logits.equal(first), "running twice gives two results"
    assert torch.random.get_rng_state().equal(state[0]) and random.getstate() == state[1], "the global random state moved"
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(vars(module)) for module in model.modules()] == keys
    assert model(**inputs).logits.equal(before)


def another_picture_gives_other_logits_when_applied(case: Case) -> None:
    """A method that shows the model nothing passes most other checks."""
    inputs = batch([[*[IMAGE] * N_PATCHES, 5, 6]])
    with apply(case.host, **case.compressor):
        one, other = (case.host(**inputs, pixel_values=pixels(1, seed)).logits[:, -1] for seed in (1, 2))
    assert (one - other).abs().max() > 0.01


def cached_generation_is_uncached_recomputation(case: Case) -> None:
    """Decoding over layers of different lengths: wrong positions or masks show only after the first new token."""
    model, inputs = case.host, _inputs(case)
    with apply(model, **case.compressor):
        cached = _answer(model, inputs)
        anew = _answer(model, inputs, use_cache=False)
    assert_close(cached.logits, anew.logits)
    assert cached.sequences[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"]), "the prompt must come back as given"


def a_left_padded_batch_gives_what_its_samples_give(case: Case) -> None:
    """The released codes of FastV, PyramidDrop and SparseVLM read sample 0 only. 2, 0 and 1 images here."""
    model, images, n_used = case.host, pixels(3), 0
    with apply(model, **case.compressor):
        together = _answer(model, _inputs(case), n_new=1).logits[0]
        for i, (row, n) in enumerate(zip(rows(model), N_IMAGES, strict=True)):
            own = {"pixel_values": images[n_used : n_used + n]} if n else {}
            n_used += n
            assert_close([together[i]], [_answer(model, {**batch([row]), **own}, n_new=1).logits[0][0]])


def sdpa_and_eager_agree_when_applied(case: Case) -> None:
    """A mask in the form that one backend ignores."""
    outs = []
    for backend in ("sdpa", "eager"):
        model = tiny_llava.host(backend)
        with apply(model, **case.compressor):
            outs.append(_answer(model, _inputs(case), n_new=2).logits)
    assert_close(*outs)


def the_source_says_what_the_tokens_are_made_of(case: Case) -> None:
    """With M-RoPE a token takes its positions from the patches that `source` names, and a map of tokens shows them: those of
    others go unnoticed. Where each token is one patch, it is that patch."""
    with apply(case.host, **case.compressor) as run:
        case.host(**_inputs(case))
        source, images, (n_last, *_) = run.source, run.images, [found[-1] for found in run.schedules]
    if source is None:
        return
    wanted = (sum(N_IMAGES), n_last, N_PATCHES)
    assert source.shape == wanted, f"source is {tuple(source.shape)}; {wanted} would be (images, tokens, patches)"
    if images is not None and not run.method.acts_in_tower and bool(((source > 0).sum(dim=-1) == 1).all()):
        made_of = source.to(images.features) @ images.features / source.to(images.features).sum(dim=-1, keepdim=True)
        assert_close(list(run.method.before_llm(images)), list(images.project(made_of)), 1e-5)


def each_family_works_or_is_refused_by_name(case: Case) -> None:
    """A method that cannot act on a kind of model must say so, not give its results."""
    try:
        for family in families.FAMILIES:
            _works_or_is_refused(case, family)
    except BaseException:
        _model_and_logits.cache_clear()  # whatever went wrong, the next method gets new models
        raise


def _works_or_is_refused(case: Case, family: str) -> None:
    model, inputs, before = _model_and_logits(family)
    try:
        with apply(model, **case.compressor) as run:
            logits = model(**inputs).logits
            assert bool(torch.isfinite(logits).all()), f"{family}: logits are not finite"
            assert run.schedule is not None, f"{family}: nothing was applied"
    except ValueError as error:
        assert case.method.name in str(error), f"{family}: the refusal does not name the method: {error}"
    assert model(**inputs).logits.equal(before), f"{family}: the model is not what it was"


@cache
def _model_and_logits(family: str) -> tuple[Any, families.Inputs, Tensor]:
    """A tiny model, its inputs and its logits: made once, for making it takes longer than what is done with it."""
    model, inputs = families.tiny_model(family)
    return model, inputs, model(**inputs).logits


Promise = Callable[[Any], None]
ON_BOTH: tuple[Promise, ...] = (
    the_schedule_is_what_happened_when_applied, the_model_is_what_it_was_afterwards,
    another_picture_gives_other_logits_when_applied, cached_generation_is_uncached_recomputation,
    a_left_padded_batch_gives_what_its_samples_give,
)  # fmt: skip
ON_ONE: tuple[Promise, ...] = (
    sdpa_and_eager_agree_when_applied, the_source_says_what_the_tokens_are_made_of, each_family_works_or_is_refused_by_name,
)  # fmt: skip
