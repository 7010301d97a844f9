"""The Hugging Face trio (configuration, modeling, processing), registered with the Auto classes on import."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from htc_vlm.model import bottlenecks  # noqa: F401  (registers the other families)
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration, HtcVlmModel
from htc_vlm.model.processing import HtcVlmProcessor
from htc_vlm.tiny import tower  # noqa: F401  (registers the tiny vision tower)

AutoConfig.register("htc_vlm", HtcVlmConfig)
AutoModel.register(HtcVlmConfig, HtcVlmModel)
AutoModelForImageTextToText.register(HtcVlmConfig, HtcVlmForConditionalGeneration)
AutoModelForMultimodalLM.register(HtcVlmConfig, HtcVlmForConditionalGeneration)
AutoProcessor.register(HtcVlmConfig, HtcVlmProcessor)

__all__ = ["CompressedImages", "HtcVlmConfig", "HtcVlmForConditionalGeneration", "HtcVlmModel", "HtcVlmProcessor"]
