"""Methods that reduce visual tokens; ONE FILE = ONE METHOD.

Every module of this folder is imported here, so a new file registers itself; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import AbstractContextManager
from typing import Any

from htc_vlm.compressors.base import (
    COMPRESSORS,
    AppliedOnly,
    Compressor,
    Drop,
    ImageFeatures,
    Keep,
    Merge,
    Seen,
    Sizes,
    TowerView,
    build,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def names() -> list[str]:
    """All registered methods."""
    return COMPRESSORS.names()


def apply(model: Any, name: str, **settings: Any) -> AbstractContextManager[Any]:
    """`with compressors.apply(model, "fastv", n_keep=98, layer=2): model.generate(...)`, on any LLaVA model.

    See htc_vlm.model.applying.apply. Found when called: this folder lies below htc_vlm.model and does not import it.
    """
    applying = importlib.import_module("htc_vlm.model.applying")
    return applying.apply(model, name, **settings)


__all__ = [
    "COMPRESSORS",
    "AppliedOnly",
    "Compressor",
    "Drop",
    "ImageFeatures",
    "Keep",
    "Merge",
    "Seen",
    "Sizes",
    "TowerView",
    "apply",
    "build",
    "names",
]
