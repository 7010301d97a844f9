"""check_compressor: it passes right methods, and finds what is wrong with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htc_vlm.compressors import (
    COMPRESSORS,
    AppliedOnly,
    AttentionView,
    Compressor,
    ImageFeatures,
    Keep,
    PruneStep,
    Sizes,
    check_count,
)
from htc_vlm.ops import masks
from htc_vlm.testing import check_compressor
from htc_vlm.testing.contract import Check, checks_of
from htc_vlm.tokens import TokenLayout

from .. import processes


@dataclass(frozen=True)
class Settings:
    n_keep: int = 4


class FirstFew(Compressor):
    """A right method: the first patches."""

    name = "first_few"
    Settings = Settings

    def n_visual(self, n_patches: int) -> int:
        return int(self.settings.n_keep)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        return images.project(images.features[:, : self.settings.n_keep])


class Lies(FirstFew):
    def schedule(self, n_patches: int, n_layers: int) -> list[int]:
        return [1] * n_layers


class Blind(FirstFew):
    def before_llm(self, images: ImageFeatures) -> Tensor:
        return images.project(torch.ones_like(images.features[:, : self.settings.n_keep]))


class Seeds(FirstFew):
    def before_llm(self, images: ImageFeatures) -> Tensor:
        torch.manual_seed(0)
        return super().before_llm(images)


class Counts(FirstFew):
    """Another result with each call."""

    n_calls = 0

    def before_llm(self, images: ImageFeatures) -> Tensor:
        self.n_calls += 1
        return super().before_llm(images) * self.n_calls


class LooksAtNeighbours(FirstFew):
    """The mean over the batch leaks from one image to the next."""

    def before_llm(self, images: ImageFeatures) -> Tensor:
        return super().before_llm(images) + images.patches.mean(dim=(0, 1))


class Shuffles(FirstFew):
    def before_llm(self, images: ImageFeatures) -> Tensor:
        return super().before_llm(images).flip(1)


class WithWeights(FirstFew):
    def setup(self, sizes: Sizes) -> None:
        self.used = nn.Linear(sizes.llm_width, sizes.llm_width)

    def before_llm(self, images: ImageFeatures) -> Tensor:
        return self.used(super().before_llm(images))


class DeadWeight(WithWeights):
    def setup(self, sizes: Sizes) -> None:
        super().setup(sizes)
        self.unused = nn.Linear(2, 2)


class Uninitialised(WithWeights):
    def setup(self, sizes: Sizes) -> None:
        super().setup(sizes)
        self.scale = nn.Parameter(torch.empty(sizes.llm_width))
        with torch.no_grad():
            self.scale.copy_(torch.rand(sizes.llm_width))  # lost where the model is built on the meta device

    def before_llm(self, images: ImageFeatures) -> Tensor:
        return super().before_llm(images) * self.scale


class TellsItsSource(FirstFew):
    def source(self, images: ImageFeatures) -> Tensor:
        return torch.eye(images.features.shape[1])[: self.settings.n_keep].expand(len(images.features), -1, -1)


class TellsTheLast(TellsItsSource):
    def source(self, images: ImageFeatures) -> Tensor:
        return super().source(images).flip(-1)


class TellsOneImage(TellsItsSource):
    def source(self, images: ImageFeatures) -> Tensor:
        return super().source(images)[:1]


class FusesTheRest(FirstFew):
    """A right method, as EViT's: the first patches, and one token that is the mean of the others; P have no others."""

    def n_visual(self, n_patches: int) -> int:
        check_count(self.name, "n_keep", self.settings.n_keep, at_most=n_patches - 1)
        return int(self.settings.n_keep) + 1

    def before_llm(self, images: ImageFeatures) -> Tensor:
        rest = images.features[:, self.settings.n_keep :].mean(dim=1, keepdim=True)
        return torch.cat((super().before_llm(images), images.project(rest)), dim=1)


class OneMore(FusesTheRest):
    """And one whose n_keep may be P: P + 1 tokens are not `none`'s."""

    def n_visual(self, n_patches: int) -> int:
        return int(self.settings.n_keep) + 1


class BadBudget(FirstFew):
    @classmethod
    def for_budget(cls, budget: float, n_patches: int, n_layers: int) -> dict[str, Any]:
        return {"n_keep": 1}


class Inside(AppliedOnly):
    """Half of the tokens leave before layer 1, which it does not promise."""

    name = "first_few"
    QUESTION_INDEPENDENT = False

    def drops(self, n_patches: int, n_layers: int) -> tuple[PruneStep, ...]:
        return (PruneStep(1),)

    def after_layer(self, layer: int, seen: AttentionView) -> Keep:
        n_images, n_now, _ = seen.states.shape
        return Keep(torch.arange(n_now // 2).expand(n_images, -1))


class InsideAndBefore(Inside):
    def before_llm(self, images: ImageFeatures) -> Tensor:
        return -images.patches


class OwnModelsDo(Compressor):
    """What drops, and does not say that it needs htc_vlm.apply."""

    name = "first_few"
    drops, after_layer = Inside.drops, Inside.after_layer


class Hides(Compressor):
    name = "first_few"

    def visible(self, layout: TokenLayout) -> Tensor:
        return masks.packed_causal(layout) & ~layout.is_visual[:, None]


@dataclass(frozen=True)
class NoDefault:
    n_keep: int


def named(cls: type[Compressor], promise: str) -> Check:
    """The one check of a promise; all of them take seconds."""
    (check,) = (check for check in checks_of(cls) if str(check) == f"first_few: {promise}")
    return check


def test_right_methods_pass() -> None:
    """And leave no name behind."""
    assert "first_few: the schedule is what happened" in check_compressor(FirstFew)
    named(WithWeights, "every weight gets a gradient")()
    for cls in (FusesTheRest, OneMore):
        named(cls, "keeping everything equals none")()
    named(TellsItsSource, "the source says what the tokens are made of")()
    assert "first_few" not in COMPRESSORS.own_names()


@pytest.mark.parametrize(
    ("cls", "promise"),
    [
        (Lies, "the schedule is what happened"),
        (Blind, "another picture gives other logits"),
        (Seeds, "the global random state is left alone"),
        (Counts, "a batch gives what its samples give alone"),
        (LooksAtNeighbours, "a batch gives what its samples give alone"),
        (Shuffles, "keeping everything equals none"),
        (TellsTheLast, "the source says what the tokens are made of"),
        (TellsOneImage, "the source says what the tokens are made of"),
        (DeadWeight, "every weight gets a gradient"),
        (Uninitialised, "new weights are initialised"),
        (BadBudget, "a budget gives settings or is refused"),
        (Inside, "the schedule is what happened when applied"),
    ],
)
def test_what_is_wrong_is_found_and_named(cls: type[Compressor], promise: str) -> None:
    """A check that never fails is no check; the notes say which promise, settings and backend."""
    with pytest.raises((AssertionError, ValueError)) as caught:
        named(cls, promise)()
    assert f"first_few: {promise}" in "\n".join(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict, "is no method; subclass"),
        ("nobody", "unknown compressor 'nobody'"),
        (type("Fake", (FirstFew,), {"name": "fastv"}), "the name 'fastv' belongs to htc_vlm.compressors.fastv.FastV"),
        (type("None_", (FirstFew,), {"EXAMPLES": ()}), "has no EXAMPLES"),
        (type("NoTuple", (FirstFew,), {"EXAMPLES": {"n_keep": 4}}), r"give a tuple of settings, e.g. \(\{'n_keep': 4\},\)"),
        (type("Needs", (FirstFew,), {"Settings": NoDefault}), "first_few needs n_keep, for which there is no default"),
    ],
)
def test_what_cannot_be_checked_is_refused(given: Any, message: str) -> None:
    """In words that say what to change."""
    with pytest.raises(ValueError, match=message):
        check_compressor(given)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (InsideAndBefore, "first_few: drops and before_llm: htc_vlm.apply acts inside the language model or before it"),
        (OwnModelsDo, "first_few: drops, after_layer would do nothing in a model's own forward, only under htc_vlm.apply"),
        (Hides, "first_few: visible would do nothing without bottleneck tokens"),
        (type("Forgets", (Inside,), {"QUESTION_INDEPENDENT": True}), "which no other question can share; set QUESTION_INDEP"),
        (type("Never", (Inside,), {"drops": Compressor.drops}), "after_layer would never be asked; override drops"),
    ],
)
def test_a_place_that_would_be_passed_over_is_refused(cls: type[Compressor], message: str) -> None:
    """It ran as if it were not there: the logits were those of `none`, or of the method without it, and all checks passed."""
    with pytest.raises(ValueError, match=message):
        checks_of(cls)
    with pytest.raises(ValueError, match=message):
        COMPRESSORS.register("first_few")(cls)
    assert "first_few" not in COMPRESSORS.own_names()


@pytest.mark.slow
def test_pytest_is_not_needed() -> None:
    """Somebody's package may be tested with unittest, or by hand."""
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from htc_vlm.testing import check_compressor\nprint(len(check_compressor('divprune')))"
    )
    done = processes.run_code(code)
    assert done.returncode == 0 and int(done.stdout) > 20, done.stderr
