"""htc-vlm: vision-language models that keep an image in one cached token.

Importing this package registers the model with the Auto classes of transformers.
"""

from __future__ import annotations

from htc_vlm import compressors
from htc_vlm.applied.apply import apply
from htc_vlm.model import CompressedImages, HtcVlmConfig, HtcVlmForConditionalGeneration, HtcVlmProcessor
from htc_vlm.model.loading import load

__version__ = "0.1.0"

__all__ = [
    "CompressedImages", "HtcVlmConfig", "HtcVlmForConditionalGeneration", "HtcVlmProcessor", "apply", "compressors", "load",
]  # fmt: skip
