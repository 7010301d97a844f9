"""The fingerprint: cheap to ask for again, and never out of date."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from htc_vlm.model import recipe as module
from htc_vlm.model.recipe import digest, fingerprint

SETTINGS = {"name": "voco"}


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2, bias=False), nn.GELU()))


@torch.no_grad()
def test_every_change_of_a_weight_is_noticed() -> None:
    """Cells of a model as it was before its training step would answer for the trained one."""
    model = small()
    seen = [fingerprint(model, SETTINGS)]
    model[0].weight.mul_(2)  # an optimizer's step
    seen.append(fingerprint(model, SETTINGS))
    model[0].weight = nn.Parameter(torch.ones(4, 3))  # replaced
    seen.append(fingerprint(model, SETTINGS))
    model[0].weight.data = torch.zeros(4, 3)  # replaced behind torch's back
    seen.append(fingerprint(model, SETTINGS))
    model[1][0] = nn.Linear(4, 2, bias=False)  # a module replaced, as adapters do
    seen.append(fingerprint(model, SETTINGS))
    model[1][0].register_parameter("bias", nn.Parameter(torch.zeros(2)))
    seen.append(fingerprint(model, SETTINGS))
    model.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    seen.append(fingerprint(model, SETTINGS))
    seen.append(fingerprint(model, {**SETTINGS, "n_bottleneck": 2}))
    assert len(set(seen)) == len(seen)


def test_an_unchanged_model_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 7 billion weights before each answer."""
    model = small()
    first, real = fingerprint(model, SETTINGS), module.digest
    calls: list[int] = []
    monkeypatch.setattr(module, "digest", lambda *args: calls.append(1) or real(*args))  # type: ignore[func-returns-value]
    assert fingerprint(model, SETTINGS) == first and not calls
    assert fingerprint(copy.deepcopy(model), SETTINGS) == first and len(calls) == 1
    assert fingerprint(model.to(torch.bfloat16), SETTINGS) == first  # the digest is of rounded values
    assert len(calls) == 2


def test_models_that_were_asked_can_still_be_copied_and_pickled() -> None:
    """What remembers the weights lives outside the model."""
    model = small()
    first = fingerprint(model, SETTINGS)
    assert fingerprint(pickle.loads(pickle.dumps(model)), SETTINGS) == first


def test_sharded_weights_are_refused_by_name() -> None:
    """Each process would cache its own share of the heads and call it the image."""
    model = nn.Linear(2, 2)
    model.weight.full_tensor = lambda: model.weight  # what marks a DTensor
    with pytest.raises(ValueError, match="weight is sharded over processes"):
        digest(model, {})
