"""The configuration of an HTC-VLM: LLaVA's, plus the compressor and the id of the bottleneck token.

Source:  transformers' LlavaConfig; HTC-VLM section 4 for what the compressor's settings mean.
Differs: nothing of LLaVA's is renamed, so any LLaVA configuration is one of ours with `compressor: {"name": "none"}`.
"""

from __future__ import annotations

import logging
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from htc_vlm import compressors

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


@strict
class HtcVlmConfig(LlavaConfig):
    r"""
    compressor (`dict`): `name` and settings of the method, see `htc_vlm.compressors.build`; default
        `{"name": "none"}`.
    bottleneck_token_id (`int`): id of the learned bottleneck token (`<voco>` in the paper); needed by bottleneck
        methods.
    image_mean, image_std (`list[float]`): how pixel_values were normalised (per channel, of values in [0, 1]): the
        anchors read the same pixels as the vision tower, de-normalised.
    """

    model_type = "htc_vlm"

    compressor: dict = field(default_factory=lambda: {"name": "none"})
    bottleneck_token_id: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> HtcVlmConfig:
        """As transformers', without "You are using a model of type `llava`": every LLaVA configuration is one of ours."""
        logger = logging.getLogger("transformers.configuration_utils")

        def passes(record: logging.LogRecord) -> bool:
            return "using a model of type `llava` to instantiate" not in record.getMessage()

        logger.addFilter(passes)
        try:
            return super().from_pretrained(*args, **kwargs)
        finally:
            logger.removeFilter(passes)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_settings(self)


def check_settings(config: Any) -> None:
    """Write out the compressor's settings, and how pixels are normalised. ValueError for what does not fit together."""
    options = dict(config.compressor or {})  # None is refused below
    if "name" not in options:
        raise ValueError(f"compressor needs a 'name', got {options}; known: {', '.join(compressors.names())}")
    method = compressors.build(**options)
    config.compressor = method.to_dict()
    if method.n_bottleneck and config.bottleneck_token_id is not None:
        if config.bottleneck_token_id == config.image_token_id:
            raise ValueError(f"bottleneck_token_id and image_token_index are both {config.image_token_id}")
        n_words = config.get_text_config().vocab_size
        if not 0 <= config.bottleneck_token_id < n_words:
            raise ValueError(
                f"bottleneck_token_id is {config.bottleneck_token_id}, the vocabulary has "
                f"{n_words} entries; use a free one (htc_vlm.model.add_compressor adds it)"
            )
    config.image_mean = list(CLIP_MEAN) if config.image_mean is None else config.image_mean
    config.image_std = list(CLIP_STD) if config.image_std is None else config.image_std
