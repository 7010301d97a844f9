"""LoRA in a training stage: low-rank adapters on the language model's matrices instead of all its weights.

Source:  LoRA (arXiv 2106.09685), as PEFT implements it; LLaVA-1.5's own LoRA recipe trains the same matrices and the projector.
Differs: the bottleneck token's embedding learns too (PEFT's trainable token), since nothing else makes that token. At the end
         the adapters are added to the weights, so the trained model is an ordinary checkpoint.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from htc_vlm.model.adapter import MATRICES, LoraSettings


def settings_from(block: dict[str, Any]) -> LoraSettings:
    """A stage's `lora` block as settings. ValueError names what is wrong in it.

    >>> settings_from({"rank": 8, "modules": ["q_proj"]})
    LoraSettings(rank=8, alpha=32, dropout=0.0, modules=('q_proj',))
    """
    known = [field.name for field in fields(LoraSettings)]
    if not isinstance(block, dict) or set(block) - set(known):
        raise ValueError(f"lora is {block!r}; known settings: {', '.join(known)}, e.g. lora: {{rank: 16}}")
    settings = LoraSettings(**{**block, "modules": tuple(block.get("modules", MATRICES))})
    for name in ("rank", "alpha"):
        if not isinstance(getattr(settings, name), int) or getattr(settings, name) < 1:
            raise ValueError(f"lora.{name} is {getattr(settings, name)!r}; give a whole number of at least 1")
    if not settings.modules or set(settings.modules) - set(MATRICES):
        raise ValueError(f"lora.modules is {list(settings.modules)}; known: {', '.join(MATRICES)}")
    return settings


def add_adapters(model: Any, settings: LoraSettings, seed: int) -> tuple[Any, frozenset[str]]:
    """Put adapters into the model, in place -> (PEFT's tuner, names of the parameters that learn in the language model)."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'htc-vlm[lora]'") from error
    options: dict[str, Any] = {}
    if model.model.compressor.n_bottleneck:
        options["trainable_token_indices"] = {"embed_tokens": [model.config.bottleneck_token_id]}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=rf"model\.(language|text)_model\..*\.({'|'.join(settings.modules)})", **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    tuner = LoraModel(model, config, "default")
    if options and model.config.tie_word_embeddings:  # checkpoints leave out one of two names for the same weights
        model._tied_weights_keys = {**type(model)._tied_weights_keys, r"lm_head\.token_adapter\.": "see embed_tokens"}
    return tuner, frozenset(name for name, weight in model.named_parameters() if weight.requires_grad)


def merge_adapters(tuner: Any) -> Any:
    """Add the adapters to the weights; the model as it was, without adapters."""
    model = tuner.merge_and_unload()
    model.__dict__.pop("_tied_weights_keys", None)
    return model
