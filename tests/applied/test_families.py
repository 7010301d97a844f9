"""`htc_vlm.apply` on tiny random models of every family: what must hold for every method that acts there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import htc_vlm
import htc_vlm.testing.families
from htc_vlm.testing import tiny_inputs, tiny_model
from htc_vlm.testing.families import FAMILIES, IMAGE

N_NEW = 3
PROMPTS = [[0], [], [1], [2]]  # three pictures of different sizes and a row of text only
BEFORE: dict[str, dict[str, Any]] = {
    "random_drop": {"n_keep": 3},
    "divprune": {"n_keep": 3},
    "tome": {"n_keep": 4, "place": "after_tower", "metric": "features"},
    "avg_pool": {"n_tokens": 4},
}
INSIDE: dict[str, dict[str, Any]] = {
    "fastv": {"n_keep": 3, "layer": 1},
    "pyramid_drop": {"stages": (1, 3), "ratio": 0.5},
    "sparse_vlm": {"layers": (0, 1), "keep": (6, 3)},
}
NO_GRID = ("llava_next", "llava_onevision")
ONE_TILE = ("internvl", "smolvlm")  # avg_pool works there on pictures of one tile
QUICK = ("divprune", "fastv", "none")  # of every family; the other methods are marked slow


def marked(family: str, name: str) -> Any:
    return pytest.param(family, name, marks=() if name in QUICK else pytest.mark.slow)


CASES = [
    marked(family, name) for family in FAMILIES for name in {**BEFORE, **INSIDE}
    if not (name == "avg_pool" and family in (*NO_GRID, *ONE_TILE))
]  # fmt: skip
KEEP_ALL = [
    marked(family, name) for family in FAMILIES
    for name in ("none", "random_drop", "divprune", "tome", "fastv", "pyramid_drop", "sparse_vlm")
]  # fmt: skip
cases = pytest.mark.parametrize(("family", "name"), CASES)
families = pytest.mark.parametrize("family", FAMILIES)
MODELS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def model_of(family: str) -> Any:
    if family not in MODELS:
        MODELS[family] = tiny_model(family)[0]
    return MODELS[family]


def answer(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=N_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def keeping_all(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Settings with which nothing leaves a prompt about one picture."""
    n = int((inputs["input_ids"] == IMAGE).sum())
    return {
        "none": {}, "random_drop": {"n_keep": n}, "divprune": {"n_keep": n}, "fastv": {"n_keep": n, "layer": 2},
        "tome": {"n_keep": n, "place": "after_tower", "metric": "features"},
        "pyramid_drop": {"stages": (1, 2), "ratio": 1.0}, "sparse_vlm": {"layers": (0, 1), "keep": (n, n)},
    }[name]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), KEEP_ALL)
def test_keeping_everything_is_the_stock_model_bit_for_bit(family: str, name: str) -> None:
    """The mechanism itself must cost nothing."""
    model, inputs = model_of(family), tiny_inputs(family, [[0]])
    plain = answer(model, inputs)
    with htc_vlm.apply(model, name, **keeping_all(name, inputs)):
        kept = answer(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@cases
def test_cached_is_recomputed(family: str, name: str) -> None:
    """Decoding over a cache that is shorter than the prompt: wrong positions or masks show after the first new token."""
    model, batch = model_of(family), tiny_inputs(family, [[0], [1]])
    n_prompt = batch["input_ids"].shape[1]
    with htc_vlm.apply(model, name, **{**BEFORE, **INSIDE}[name]):
        out = answer(model, batch)
        for step in range(1, N_NEW):
            ids = out.sequences[:, : n_prompt + step]
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, step), value=1)
            again = {**batch, "input_ids": ids, "attention_mask": mask}
            if "mm_token_type_ids" in batch:
                again["mm_token_type_ids"] = (ids == IMAGE).int()
            logits = model(**again, use_cache=False, prompt_length=n_prompt).logits
            close(logits[:, -1], out.logits[step])


@cases
def test_a_ragged_left_padded_batch_gives_what_its_rows_give(family: str, name: str) -> None:
    """Three pictures of different sizes and a row of text only."""
    model = model_of(family)
    with htc_vlm.apply(model, name, **{**BEFORE, **INSIDE}[name]):
        together = answer(model, tiny_inputs(family, PROMPTS))
        for i, pictures in enumerate(PROMPTS):
            batch = tiny_inputs(family, PROMPTS[: i + 1])
            real = batch["attention_mask"][i].bool()
            one = {**tiny_inputs(family, [pictures]), "input_ids": batch["input_ids"][i][real][None]}
            one["attention_mask"] = torch.ones_like(one["input_ids"])
            if "mm_token_type_ids" in one:
                one["mm_token_type_ids"] = (one["input_ids"] == IMAGE).int()
            alone = answer(model, one)
            close(torch.stack(together.logits)[:, i], torch.stack(alone.logits)[:, 0])


@families
def test_sampled_answers_continue_their_own_prompts(family: str) -> None:
    """Sampling repeats each row, and what a method remembers of the prompts must be repeated with them."""
    model, batch = model_of(family), tiny_inputs(family, [[0], [], [1]])
    n_prompt = batch["input_ids"].shape[1]
    with torch.random.fork_rng(devices=[]), htc_vlm.apply(model, "divprune", n_keep=3):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "output_logits": True}
        out = model.generate(**batch, max_new_tokens=N_NEW, return_dict_in_generate=True, **options)
        step = N_NEW - 1
        ids = out.sequences[::2, : n_prompt + step]  # the first answer to each prompt
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, step), value=1)
        again = {**batch, "input_ids": ids, "attention_mask": mask}
        if "mm_token_type_ids" in batch:
            again["mm_token_type_ids"] = (ids == IMAGE).int()
        logits = model(**again, use_cache=False, prompt_length=n_prompt).logits
    close(logits[:, -1], out.logits[step][::2])


@families
def test_a_budget_as_a_share_fits_pictures_of_every_size(family: str) -> None:
    """`n_keep=64` of a picture with 40 tokens is refused; a share of 0.25 is a quarter of each."""
    model, batch = model_of(family), tiny_inputs(family, [[0], [1], [2]])
    sizes = htc_vlm.testing.families.n_tokens(batch)
    with htc_vlm.apply(model, "divprune", budget=0.25) as applied:
        out = model(**batch, use_cache=True)
    assert applied.schedules == [[round(0.25 * n)] * 4 for n in sizes]
    longest = max(int(m.sum()) - n + round(0.25 * n) for m, n in zip(batch["attention_mask"], sizes, strict=True))
    assert out.past_key_values.get_seq_length() == longest


@families
def test_a_number_of_tokens_that_a_small_picture_lacks_is_refused(family: str) -> None:
    """Not padded, and not silently fewer."""
    model, batch = model_of(family), tiny_inputs(family, [[0], [1]])
    with pytest.raises(ValueError, match=r"only \d+"), htc_vlm.apply(model, "divprune", n_keep=60):
        model(**batch)


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*case.values, marks=() if case.values[1] == "divprune" else pytest.mark.slow) for case in CASES],
)
def test_beams_and_generation_without_a_cache_agree(family: str, name: str) -> None:
    """Beams repeat and reorder what is known of a prompt; without a cache each step reads all of it anew."""
    model, batch = model_of(family), tiny_inputs(family, [[0], [1]])
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2, "return_dict_in_generate": True}
    with htc_vlm.apply(model, name, **{**BEFORE, **INSIDE}[name]):
        cached = model.generate(**batch, **options, output_scores=True)
        anew = model.generate(**batch, **options, output_scores=True, use_cache=False)
    close(cached.sequences_scores, anew.sequences_scores)


@families
def test_several_pictures_in_one_prompt_are_each_pruned(family: str) -> None:
    """And the last prompt's answer is that of the prompt alone."""
    model = model_of(family)
    with htc_vlm.apply(model, "divprune", n_keep=3) as applied:
        batch = answer(model, tiny_inputs(family, [[1, 0], [2]]))
        alone = answer(model, tiny_inputs(family, [[1, 0]]))
    assert {layers[0] for layers in applied.schedules} == {3}
    close(torch.stack(batch.logits)[:, 0], torch.stack(alone.logits)[:, 0])


@families
def test_forgotten_pixels_are_refused(family: str) -> None:
    """Nothing was pruned, and the answer came from the placeholders' own embeddings. Text alone is answered."""
    model, inputs = model_of(family), tiny_inputs(family, [[0]])
    forgotten = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    words = {name: value[:, -2:] for name, value in forgotten.items()}
    with htc_vlm.apply(model, "divprune", n_keep=3):
        for call in (model, model.base_model, model.generate):
            with pytest.raises(ValueError, match="no image was given"):
                call(**forgotten)
        assert model(**words).logits.shape[1] == 2
        assert model.generate(**words, max_new_tokens=2, do_sample=False).shape[1] <= 4


@families
def test_afterwards_the_model_is_bit_identical(family: str) -> None:
    """Outside the block nothing is left: classes, attributes, logits."""
    model, batch = model_of(family), tiny_inputs(family, [[0]])
    before = model(**batch).logits
    kept = [(type(module), sorted(module.__dict__)) for module in model.modules()]
    for name in ("divprune", "fastv"):
        with htc_vlm.apply(model, name, **{**BEFORE, **INSIDE}[name]):
            assert not torch.equal(model(**batch).logits[:, -1], before[:, -1])
    assert [(type(module), sorted(module.__dict__)) for module in model.modules()] == kept
    assert torch.equal(model(**batch).logits, before)


@families
def test_a_following_turn_continues_the_shorter_cache(family: str) -> None:
    """New text over a cut cache, by the model's own numbering: it stands where it stood behind the whole prompt."""
    model, batch = model_of(family), tiny_inputs(family, [[0]])
    more = torch.tensor([[20, 21]])
    whole = {**batch, "input_ids": torch.cat((batch["input_ids"], more), 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (whole["input_ids"] == IMAGE).int()
    with htc_vlm.apply(model, "divprune", n_keep=3):
        first = model(**batch, use_cache=True)
        second = model(more, past_key_values=first.past_key_values)
        close(second.logits, model(**whole).logits[:, -2:])


@families
def test_what_a_family_cannot_do_is_refused_by_name(family: str) -> None:
    """Before anything is changed; the refusal says what works."""
    model = model_of(family)
    kept = [type(module) for module in model.modules()]
    if family != "llava":
        for name in ("visionzip", "tome"):
            with pytest.raises(ValueError, match=f"{name} acts in a CLIP tower.*use divprune"), htc_vlm.apply(model, name):
                raise AssertionError("entered")
    if family in NO_GRID:
        with pytest.raises(ValueError, match="avg_pool needs a grid"), htc_vlm.apply(model, "avg_pool"):
            raise AssertionError("entered")
    with htc_vlm.apply(model, "divprune", n_keep=3), pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(**tiny_inputs(family, [[0]]), max_new_tokens=1, cache_implementation="static")
    assert [type(module) for module in model.modules()] == kept


def test_a_model_of_no_known_family_gets_the_defaults() -> None:
    """A newcomer need not wait for a release of ours, if it answers to transformers' own names."""
    from htc_vlm.applied.families import Family, family_of

    model, batch = tiny_model("internvl")
    model.config.__class__ = type("NewVLConfig", (type(model.config),), {"model_type": "new_vl"})
    assert type(family_of(model)) is Family
    with htc_vlm.apply(model, "divprune", n_keep=3) as applied:
        model(**batch)
    assert applied.schedule == [3] * 4
    with pytest.raises(ValueError, match=r"got Linear, which lacks get_decoder, config.image_token_id, get_image_features"):
        family_of(torch.nn.Linear(2, 2))
