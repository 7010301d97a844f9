"""Initialise, load and save the weights of an HTC-VLM, with or without a head.

Source:  transformers' LlavaPreTrainedModel.
Differs: checkpoints named as LLaVA's on the hub load too; files carry the names in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaPreTrainedModel

from htc_vlm.applied.hf_compat import n_patches
from htc_vlm.compressors import Compressor, Sizes
from htc_vlm.convert.llava_original import check_layout
from htc_vlm.files import open_to_umask
from htc_vlm.model import unfilled
from htc_vlm.model.configuration import HtcVlmConfig
from htc_vlm.model.generation_defaults import drop_ignored

# How LLaVA checkpoints on the hub name their weights -> the names in memory (and in files that we write).
# transformers does the same renaming, but only for its own classes.
HUB_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}


class HoldsCompressor:
    """Mixed in front of a model with a compressor inside: its weights are initialised, loaded and saved with the others."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Compressor):
            module.init_own_weights()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. What no checkpoint holds is filled in (unfilled.py)."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        unfilled.fill(model, info["missing_keys"], cls._sizes(model.config))
        return (model, info) if wants_info else model

    @staticmethod
    def _sizes(config: Any) -> Sizes:
        raise NotImplementedError

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As transformers', under the names in memory: Trainer resumes by these, and would silently skip hub names. Generation
        defaults that are ignored are left out (they would be refused), and files are readable as the umask says."""
        model: Any = self
        if model.can_generate():
            drop_ignored(model.generation_config)
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]
        folder = Path(kwargs["save_directory"] if "save_directory" in kwargs else args[0])
        if folder.is_dir():
            open_to_umask(folder)


def sizes_of(config: HtcVlmConfig) -> Sizes:
    """What compressors with weights need to know, read from the configuration."""
    vision = config.vision_config
    n_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return Sizes(
        n_patches=n_patches(config),
        vision_width=vision.hidden_size * n_layers,
        llm_width=config.text_config.hidden_size,
        initializer_range=config.text_config.initializer_range,
        n_kv_heads=config.text_config.num_key_value_heads,
    )


class HtcVlmPreTrainedModel(HoldsCompressor, LlavaPreTrainedModel):
    config_class = HtcVlmConfig
    config: HtcVlmConfig
    _sizes = staticmethod(sizes_of)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; checkpoints named as LLaVA's on the hub are understood too, and what no checkpoint holds is filled
        in. ValueError for a folder in the layout of the original LLaVA code, before a model is built."""
        kwargs.setdefault("key_mapping", HUB_NAMES)
        check_layout(kwargs.get("pretrained_model_name_or_path", args[0] if args else None))
        return super().from_pretrained(*args, **kwargs)
