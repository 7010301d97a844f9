"""Settings and budgets that make no method are refused by name: what was given, and for what."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

import htc_vlm
from htc_vlm import compressors
from htc_vlm.compressors import COMPRESSORS, Compressor
from htc_vlm.testing import tiny_model

WRONG: tuple[Any, ...] = ("x", b"x", 1.5j, object(), [["x"]], {"a": 1}, float("nan"), 2**70)
CASES = [(name, field.name) for name in compressors.names() for field in fields(COMPRESSORS.get(name).Settings)]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_a_setting_of_another_type_is_refused_by_its_name(name: str, setting: str) -> None:
    """`stages=3` and `seed="x"` were TypeErrors of Python and RuntimeErrors of torch, `plus="no"` was plus."""
    cls: Any = COMPRESSORS.get(name)
    refused = 0
    for value in WRONG:
        try:
            method = compressors.build(name, **{**cls.EXAMPLES[0], setting: value})
            method.schedule(16, 4)
        except ValueError as error:
            assert setting in str(error) or "choose from" in str(error) or "tokens" in str(error), (value, error)
            refused += 1
    assert refused >= len(WRONG) - 2, "a number too large for this model may be found out later"


def test_numbers_keep_their_type_and_lists_become_tuples() -> None:
    """JSON and YAML write no tuples; a number is no text."""
    assert compressors.build("pyramid_drop", stages=[1, 2], ratio=[0.5, 0.25]).to_dict()["stages"] == (1, 2)
    with pytest.raises(ValueError, match="fastv: n_keep is '9'; give a whole number"):
        compressors.build("fastv", n_keep="9")
    with pytest.raises(ValueError, match="sparse_vlm: plus is 'no'; give true or false"):
        compressors.build("sparse_vlm", layers=(0,), keep=(3,), plus="no")
    with pytest.raises(ValueError, match="random_drop: seed is 1180591620717411303424; give a whole number of at most 63 bits"):
        compressors.build("random_drop", seed=2**70)


def test_settings_whose_types_are_not_told_are_the_method_s_own_affair() -> None:
    """A method's types may stand in the function that makes it."""

    class Strange: ...

    @dataclass(frozen=True)
    class Settings:
        n: Strange | int = 3

    class Mine(Compressor):
        name = "mine"

    Mine.Settings = Settings
    COMPRESSORS.register("mine")(Mine)
    try:
        assert compressors.build("mine", n="4").settings.n == "4"
    finally:
        COMPRESSORS.unregister("mine")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fastv", {"n_keep": 4}, "fastv: budget 8 sets n_keep, layer; leave out n_keep, or the budget"),
        ("fastv", {"layer": 2}, "leave out layer, or the budget"),
        ("divprune", {"n_keep": 4}, "leave out n_keep, or the budget"),
        ("none", {}, r"none has no setting for a budget \(8\); leave it out"),
        ("pyramid_drop", {}, "a budget has three stages, for which 4 layers are too few; give stages and ratio"),
    ],
)
def test_a_budget_beside_what_it_sets_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    """One of the two was ignored without a word: `budget=8, n_keep=4` kept 4, and another layer kept another mean."""
    model, _ = tiny_model("llava")
    with pytest.raises(ValueError, match=message), htc_vlm.apply(model, name, budget=8, **settings):
        pass


def test_a_budget_goes_with_settings_that_it_does_not_set() -> None:
    model, _ = tiny_model("llava")
    with htc_vlm.apply(model, "tome", budget=8, place="after_tower", metric="features") as applied:
        assert applied.method.to_dict()["n_keep"] == 8


def test_a_budget_of_tokens_is_that_of_the_picture() -> None:
    """Where pictures differ in size, 576 tokens were taken for the most: 640 of LLaVA-NeXT's 2,880 were refused."""
    model, _ = tiny_model("llava_next")
    for name in ("divprune", "random_drop", "fastv"):
        with htc_vlm.apply(model, name, budget=640) as applied:
            assert applied.method.schedule(2880, 4)[-1] == 640 or name == "fastv"


@pytest.mark.parametrize("compressor", ["voco", {"n_bottleneck": 2}, 7, {"name": 3}])
def test_a_compressor_is_a_mapping_with_a_name(compressor: Any) -> None:
    """`compressor="voco"` was "dictionary update sequence element #0 has length 1"."""
    with pytest.raises(ValueError, match="compressor is .*; give a mapping with its name"):
        htc_vlm.load("tiny-upper", compressor=compressor)


def test_compressed_images_are_no_list() -> None:
    """A list of them was an AttributeError."""
    model, _ = tiny_model("llava")
    with pytest.raises(ValueError, match=r"compressed is a list; give what compress returned \(CompressedImages.concat"):
        htc_vlm.generate(model, None, compressed=[1], text=["what ?"])  # type: ignore[arg-type]
