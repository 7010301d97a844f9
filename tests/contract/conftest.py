"""Every registered compressor with every one of its examples, on sdpa and eager."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from htc_vlm import compressors
from htc_vlm.compressors import COMPRESSORS, AppliedOnly
from htc_vlm.model import HtcVlmForConditionalGeneration

from ..tinies import shared

BACKENDS = ("sdpa", "eager")


@dataclass(frozen=True)
class Case:
    """One method with settings, as the compressor of a model."""

    compressor: dict[str, Any]
    attention: str

    @property
    def model(self) -> HtcVlmForConditionalGeneration:
        """Shared by all tests; do not change it."""
        return shared(self.compressor, self.attention)

    def __str__(self) -> str:
        settings = {key: value for key, value in self.compressor.items() if key not in ("name", "quantizer")}
        return f"{self.compressor['name']}{json.dumps(settings)}-{self.attention}".replace('"', "")


def own() -> list[dict[str, Any]]:
    """Methods that can be a model's own compressor, with each example; the others need `htc_vlm.apply`."""
    return [
        {"name": name, **example}
        for name in compressors.names()
        if not issubclass(COMPRESSORS.get(name), AppliedOnly)
        for example in COMPRESSORS.get(name).EXAMPLES
    ]


CASES = [Case(compressor, attention) for compressor in own() for attention in BACKENDS]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
