"""What a method promises as a model's own compressor. Each docstring names the fault that the check prevents."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from htc_vlm.compressors import AppliedOnly, Compressor, build
from htc_vlm.model import HtcVlmConfig, HtcVlmForConditionalGeneration
from htc_vlm.testing import tiny_llava
from htc_vlm.testing.cases import Case, entering_lengths
from htc_vlm.testing.tiny_llava import (
    N_IMAGES,
    N_LAYERS,
    N_PATCHES,
    assert_close,
    batch,
    image_ids,
    pixels,
    rows,
    text_logits,
)  # fmt: skip

QUANTIZER = ".quantizer."  # weights that a file brings


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report of the weights that are to be made."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _marked_memory() -> Iterator[None]:
    """torch fills memory that nobody has written to with NaN."""
    was_on, only_warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.utils.deterministic.fill_uninitialized_memory is True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warns)


# ------------------------------------------------------------------------------------------------ of the class
def the_class_says_what_it_is(cls: type[Compressor]) -> None:
    """A method without a name of its own cannot be saved; one with an unknown place is in no table."""
    assert vars(cls).get("name") or cls.name, "set `name`"
    made = build(cls.name, **cls.EXAMPLES[0])
    assert type(made) is cls, f"{cls.name} builds {type(made).__name__}"
    assert made.to_dict()["name"] == cls.name


def settings_survive_json(cls: type[Compressor]) -> None:
    """Tuples come back from JSON as lists, and a checkpoint then has other settings than it was saved with."""
    for example in cls.EXAMPLES:
        method = build(cls.name, **example)
        assert build(**json.loads(json.dumps(method.to_dict()))).settings == method.settings, example


def unknown_settings_are_refused(cls: type[Compressor]) -> None:
    """A misspelt setting that is ignored makes a run that nobody asked for."""
    try:
        build(cls.name, no_such_setting=1)
    except ValueError as error:
        assert "no_such_setting" in str(error)
    else:
        raise AssertionError(f"{cls.name} takes a setting `no_such_setting`")


def a_budget_gives_settings_or_is_refused(cls: type[Compressor]) -> None:
    """`htc-vlm cost` and `--budget` trust the settings that a method makes of a budget."""
    for budget in (64, 192, 0.25):
        try:
            settings = cls.for_budget(budget, 576, 32)
        except ValueError as error:
            assert cls.name in str(error), f"the refusal does not name the method: {error}"
            continue
        method = build(cls.name, **settings)
        if cls.name == "none" or method.n_bottleneck:
            continue  # reads all patches
        wanted = budget if isinstance(budget, int) else budget * 576
        mean = sum(method.schedule(576, 32)) / 32
        assert 0.75 * wanted <= mean <= 1.35 * wanted, f"a budget of {wanted:.0f} tokens became {settings}, {mean:.1f} tokens"


def every_weight_gets_a_gradient(cls: type[Compressor]) -> None:
    """A layer that nothing reads, or that is detached, is trained for nothing. Over all examples together: one query alone
    has no use for the queries and keys of its self-attention."""
    learns: dict[str, bool] = {}
    for example in cls.EXAMPLES:
        model = tiny_llava.build({"name": cls.name, **example}).train()
        inputs, images = batch(rows(model)), pixels(3)
        labels = inputs["input_ids"].masked_fill(~tiny_llava.is_text(inputs), -100)
        with torch.enable_grad():
            model(**inputs, pixel_values=images, labels=labels).loss.backward()
        for name, weight in model.model.compressor.named_parameters():
            if weight.requires_grad:
                learns[name] = learns.get(name, False) or (weight.grad is not None and bool(weight.grad.ne(0).any()))
    assert all(learns.values()), f"no gradient reaches {', '.join(name for name, ok in learns.items() if not ok)}"


# ------------------------------------------------------------------------------------------------ of each example
def the_schedule_is_what_happened(case: Case) -> None:
    """A method that reports fewer tokens than its layers see gets its place in the cost tables for nothing."""
    model, promised = case.model, case.model.model.compressor.schedule(N_PATCHES, N_LAYERS)
    text = [5, 6, 7]
    inputs = batch([[*image_ids(model), *text]])
    seen = entering_lengths(model, lambda: model(**inputs, pixel_values=pixels(1)))
    assert [n - len(text) for n in seen] == promised, f"promised {promised}, saw {[n - len(text) for n in seen]}"
    if model.model.compressor.n_bottleneck:
        assert entering_lengths(model, lambda: model.compress(pixel_values=pixels(1))) == promised


def the_cache_holds_what_was_promised(case: Case) -> None:
    """Patches that stay in the cache after compression make its size a claim, not a fact."""
    model, text, n_new = case.model, [5, 6, 7], 2
    inputs = batch([[*image_ids(model), *text]])
    out = model.generate(**inputs, pixel_values=pixels(1), max_new_tokens=n_new, do_sample=False, return_dict_in_generate=True)
    kept = [layer.keys.shape[2] - len(text) - (n_new - 1) for layer in out.past_key_values.layers]
    assert kept == model.model.compressor.cached_tokens(N_PATCHES, N_LAYERS), f"cached {kept}"


def another_picture_gives_other_logits(case: Case) -> None:
    """All other checks would pass for a model that never looks at its image."""
    model = case.model
    inputs = batch([[*image_ids(model), 5, 6]])
    (one,), (other,) = (text_logits(model, inputs, pixel_values=pixels(1, seed)) for seed in (1, 2))
    assert (one - other).abs().max() > 0.01


def logits_are_finite(case: Case) -> None:
    """Two answers of NaN are equal, and every comparison with them passes."""
    for logits in text_logits(case.model, batch(rows(case.model)), pixel_values=pixels(3)):
        assert bool(torch.isfinite(logits).all())


def a_batch_gives_what_its_samples_give_alone(case: Case) -> None:
    """Images given to the wrong sample, or masks that leak between rows."""
    model, images = case.model, pixels(3)
    together = text_logits(model, batch(rows(model)), pixel_values=images)
    alone, n_used = [], 0
    for row, n in zip(rows(model), N_IMAGES, strict=True):
        own = images[n_used : n_used + n] if n else None
        alone += text_logits(model, batch([row]), pixel_values=own)
        n_used += n
    assert_close(together, alone)


def padding_changes_nothing(case: Case) -> None:
    """Padding that is looked at or counted as a position; rows that see nothing turn into NaN and spread."""
    model, images, prompts = case.model, pixels(3), rows(case.model)
    expected = text_logits(model, batch(prompts), pixel_values=images)
    for n_extra, side in ((5, "left"), (3, "right")):
        assert_close(text_logits(model, batch(prompts, n_extra, side), pixel_values=images), expected)
    alone = batch([prompts[0]])
    logits = model(input_ids=alone["input_ids"], pixel_values=pixels(2)).logits  # no mask: no padding
    assert_close([logits[tiny_llava.is_text(alone)]], text_logits(model, alone, pixel_values=pixels(2)))


def no_image_and_two_images_work(case: Case) -> None:
    """A text-only prompt is plain LLaVA, also for a model whose tokens never see patches; two images differ from one."""
    model, image = case.model, image_ids(case.model)
    none = text_logits(model, batch([[5, 6, 7]]))
    two = batch([[*image, 5, *image, 6, 7]])
    same = text_logits(model, two, pixel_values=pixels(1).repeat(2, 1, 1, 1))
    different = text_logits(model, two, pixel_values=pixels(2))
    assert all(bool(torch.isfinite(x).all()) for x in (*none, *same, *different))
    if not model.model.compressor.n_fusion:  # whose words have all read all images before the language model begins
        assert_close([same[0][0]], [different[0][0]])  # before the second image
    assert (same[0][-1] - different[0][-1]).abs().max() > 1e-3


def cached_generation_equals_full_forward(case: Case) -> None:
    """Positions or masks that are right in the first pass and drift with every cached token."""
    model, inputs, images, n_new = case.model, batch(rows(case.model)), pixels(3), 4
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, pixel_values=images, max_new_tokens=n_new, **options)
    n_prompt = inputs["input_ids"].shape[1]
    assert out.sequences[:, :n_prompt].equal(inputs["input_ids"]), "generate must return the prompt as it was given"
    for step, logits in enumerate(out.logits):
        ids = out.sequences[:, : n_prompt + step]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)
        extra: dict[str, Tensor] = {}
        if model.model.compressor.n_fusion:  # what was generated is not read by pre-fusion
            extra["is_answer"] = torch.arange(ids.shape[1]).expand_as(ids) >= n_prompt
        again = model(input_ids=ids, attention_mask=mask, pixel_values=images, **extra).logits[:, -1]
        assert_close([logits], [again])


def beams_are_those_of_one_sample(case: Case) -> None:
    """generate repeats what it knows of the images for each beam, and leaves behind what it does not know."""
    model, images, prompts = case.model, pixels(3), rows(case.model)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    together = model.generate(**batch(prompts), pixel_values=images, **options).sequences_scores
    for i, own in ((0, images[:2]), (2, images[2:])):
        alone = model.generate(**batch([prompts[i]]), pixel_values=own, **options).sequences_scores
        assert_close([together[2 * i : 2 * i + 2]], [alone])


def asking_for_hidden_states_and_running_twice_change_nothing(case: Case) -> None:
    """A hidden state that survives a forward pass; FastV's released code computes other logits once somebody looks."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    first = text_logits(model, inputs, pixel_values=images)
    model.generate(**inputs, pixel_values=images, max_new_tokens=2, do_sample=False)
    assert_close(text_logits(model, inputs, pixel_values=images), first, 0)
    assert_close(text_logits(model, inputs, pixel_values=images, output_hidden_states=True), first, 0)
    if case.attention == "eager":
        assert_close(text_logits(model, inputs, pixel_values=images, output_attentions=True), first, 0)


def the_global_random_state_is_left_alone(case: Case) -> None:
    """A method that seeds the global generator makes the whole training run depend on it."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)  # a state that no seed gives
        before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
        text_logits(model, inputs, pixel_values=images)
        model.generate(**inputs, pixel_values=images, max_new_tokens=2, do_sample=False)
        after = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert before[0].equal(after[0]) and before[1:] == after[1:]


def sdpa_and_eager_agree(case: Case) -> None:
    """A 4-D bool mask is obeyed by sdpa and nearly ignored by eager, silently."""
    inputs, images = batch(rows(case.model)), pixels(3)
    eager = tiny_llava.shared(case.compressor, "eager")
    expected = text_logits(eager, inputs, pixel_values=images)
    assert_close(text_logits(case.model, inputs, pixel_values=images), expected)


def settings_and_weights_survive_saving(case: Case) -> None:
    """A setting that JSON changes (tuples, defaults) or a weight that is not saved."""
    model, inputs, images = case.model, batch(rows(case.model)), pixels(3)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = HtcVlmConfig.from_pretrained(folder)
        method = model.model.compressor
        assert config.compressor == method.to_dict() == model.config.compressor
        assert build(**config.compressor).settings == method.settings
        again = HtcVlmForConditionalGeneration.from_pretrained(folder, attn_implementation=case.attention).eval()
    assert again.recipe().digest == model.recipe().digest
    expected = text_logits(model, inputs, pixel_values=images)
    assert_close(text_logits(again, inputs, pixel_values=images), expected, 0)


def new_weights_are_initialised(case: Case) -> None:
    """A checkpoint without the method's weights is loaded on the meta device: what nothing initialises is whatever lay in
    memory, another model with each load and often NaN. (A quantizer's weights come from a file, and are left out.)"""
    if all(QUANTIZER in f".{name}" for name in case.model.model.compressor.state_dict()):
        return  # it has no weights of its own
    models = []
    with _quiet(), _marked_memory(), tempfile.TemporaryDirectory() as folder:
        case.plain.save_pretrained(folder)
        for _ in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                models.append(HtcVlmForConditionalGeneration.from_pretrained(folder, config=tiny_llava.config(case.compressor)))
    first, second = ({name: value for name, value in model.state_dict().items() if QUANTIZER not in name} for model in models)
    for name, value in first.items():
        assert value.equal(second[name]), f"{name} differs from one load to the next: initialise it in init_own_weights"
        assert bool(torch.isfinite(value).all()), f"{name} is not finite"


def keeping_everything_equals_none(case: Case) -> None:
    """A selection that shuffles or re-scales what it keeps. Only for methods with a setting n_keep or n_tokens that may be P
    and then gives P tokens."""
    kept = [what for what in ("n_keep", "n_tokens") if what in case.method.to_dict()]
    if not kept or type(case.method).setup not in (Compressor.setup, AppliedOnly.setup):
        return
    everything = {**case.compressor, kept[0]: N_PATCHES}
    try:
        if build(**everything).n_visual(N_PATCHES) != N_PATCHES:
            return
    except ValueError:
        return
    none = case.plain
    model = tiny_llava.build(everything, case.attention)
    model.load_state_dict(none.state_dict())
    inputs, images = batch(rows(none)), pixels(3)
    expected = text_logits(none, inputs, pixel_values=images)
    assert_close(text_logits(model, inputs, pixel_values=images), expected, 1e-5)


# ------------------------------------------------------------------------------------------------ bottlenecks
def one_pass_equals_two_passes(case: Case) -> None:
    """Training would teach one model and inference run another. Only for methods with bottleneck tokens."""
    model = case.model
    if not model.model.compressor.n_bottleneck:
        return
    inputs, images = batch(rows(model)), pixels(3)
    one = text_logits(model, inputs, pixel_values=images)
    two = model(**inputs, compressed=model.compress(pixel_values=images)).logits
    assert_close([row[-len(text) :] for row, text in zip(two, one, strict=True)], one)


def a_stored_image_can_stand_anywhere(case: Case) -> None:
    """Keys and values that depend on what stood around the image when it was compressed, or on its place."""
    model = case.model
    if not model.model.compressor.n_bottleneck:
        return
    image, kv = image_ids(model), model.compress(pixel_values=pixels(3))
    for order in ([2, 0], [1, 1]):
        inputs = batch([[4, 5, 6, *image, 7, *image, 8, 9]])
        one = text_logits(model, inputs, pixel_values=pixels(3)[order])
        assert_close([model(**inputs, compressed=kv[order]).logits[0]], one)


Promise = Callable[[Any], None]
OF_CLASS: tuple[Promise, ...] = (
    the_class_says_what_it_is, settings_survive_json, unknown_settings_are_refused, a_budget_gives_settings_or_is_refused,
)  # fmt: skip
ON_BOTH: tuple[Promise, ...] = (
    the_schedule_is_what_happened, the_cache_holds_what_was_promised, another_picture_gives_other_logits, logits_are_finite,
    a_batch_gives_what_its_samples_give_alone, padding_changes_nothing, no_image_and_two_images_work,
    cached_generation_equals_full_forward, asking_for_hidden_states_and_running_twice_change_nothing,
    the_global_random_state_is_left_alone, keeping_everything_equals_none, one_pass_equals_two_passes,
    a_stored_image_can_stand_anywhere,
)  # fmt: skip
ON_ONE: tuple[Promise, ...] = (
    sdpa_and_eager_agree, settings_and_weights_survive_saving, new_weights_are_initialised, beams_are_those_of_one_sample,
)  # fmt: skip
