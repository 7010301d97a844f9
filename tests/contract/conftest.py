"""What the tests of bottleneck methods run on."""

from __future__ import annotations

from typing import Any

from htc_vlm.compressors import COMPRESSORS, AppliedOnly

BACKENDS = ("sdpa", "eager")


def own() -> list[dict[str, Any]]:
    """Methods that can be a model's own compressor, with each example; the others need `htc_vlm.apply`."""
    return [
        {"name": name, **example}
        for name in COMPRESSORS.own_names()
        if not issubclass(COMPRESSORS.get(name), AppliedOnly)
        for example in COMPRESSORS.get(name).EXAMPLES
    ]
