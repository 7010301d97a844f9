"""Methods that reduce visual tokens; ONE FILE = ONE METHOD.

Every module of this folder is imported here, so a new file registers itself; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil

from htc_vlm.compressors.base import (
    COMPRESSORS,
    AppliedOnly,
    AttentionView,
    Compressor,
    ImageFeatures,
    Keep,
    Merge,
    PruneStep,
    Sizes,
    TowerView,
    at_budget,
    budget_tokens,
    build,
    check_choice,
    check_count,
    check_seed,
    get,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def names() -> list[str]:
    """All registered methods."""
    return COMPRESSORS.names()


__all__ = [
    "COMPRESSORS",
    "AppliedOnly",
    "Compressor",
    "PruneStep",
    "ImageFeatures",
    "Keep",
    "Merge",
    "AttentionView",
    "Sizes",
    "TowerView",
    "at_budget",
    "budget_tokens",
    "build",
    "check_choice",
    "check_count",
    "check_seed",
    "get",
    "names",
]
