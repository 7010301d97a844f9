"""htc-vlm: vision-language models that keep an image in one cached token.

Names are imported when they are first used, so that `htc-vlm --help` needs neither torch nor transformers. Importing any
of them registers the model with the Auto classes of transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "HtcVlmForConditionalGeneration": "htc_vlm.model",
    "HtcVlmProcessor": "htc_vlm.model",
    "HtcVlmConfig": "htc_vlm.model",
    "CompressedImages": "htc_vlm.model",
    "load": "htc_vlm.model.loading",
    "apply": "htc_vlm.model.applying",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in (
        "compressors",
        "ops",
        "quantizers",
        "model",
        "data",
        "train",
        "eval",
        "analysis",
        "tokens",
        "registry",
    ):
        return importlib.import_module(f"htc_vlm.{name}")
    raise AttributeError(f"module 'htc_vlm' has no attribute {name!r}; it has: {', '.join(__all__)}")
