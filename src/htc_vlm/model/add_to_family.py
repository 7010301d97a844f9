"""Put a bottleneck into a checkpoint of another family than LLaVA: what `htc-vlm convert` does with it.

Source:  add_compressor.py, which does the same for LLaVA; model/bottlenecks.py for the classes.
Differs: the stock model is loaded by transformers, under whatever names its checkpoint has, and becomes ours in place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from htc_vlm.model.add_compressor import NO_QUANTIZER, QUANTIZER, add_bottleneck_token, check_fit, load_quantizer, refuse_unread
from htc_vlm.model.bottlenecks import check_method, classes_of, is_ours
from htc_vlm.model.configuration import check_settings
from htc_vlm.model.generation_defaults import check_defaults
from htc_vlm.model.load_report import holds_weights, without_load_report
from htc_vlm.model.movable import check_decoder


def with_bottleneck(
    path: str | os.PathLike[str],
    model_type: str,
    compressor: Mapping[str, Any],
    mgvq: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
    allow_untrained_quantizer: bool = False,
) -> tuple[Any, Any]:
    """A checkpoint of a family (stock, or ours with another bottleneck) with this bottleneck, and its processor.

    As `add_compressor.with_compressor`. ValueError for families, methods and decoders that it cannot be.
    """
    classes = classes_of(model_type)
    method: Any = check_method(compressor, classes.model.__name__)
    if mgvq is not None:
        refuse_unread(method, mgvq)
    needs_code = getattr(method, "has_code", False) and mgvq is None and not allow_untrained_quantizer
    if needs_code and not (is_ours(model_type) and holds_weights(path, QUANTIZER)):
        raise ValueError(NO_QUANTIZER)
    processor = classes.processor.from_pretrained(path)
    with without_load_report():
        if is_ours(model_type):
            config = classes.config.from_pretrained(path)
            config.compressor = dict(compressor)
            check_settings(config)
            model, info = classes.model.from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        else:
            model, info = classes.stock.from_pretrained(path, dtype=dtype, output_loading_info=True)
    check_fit(path, info)
    if not is_ours(model_type):
        model = put_in(model, compressor, processor.image_processor)
    elif needs_code and any(name.startswith(QUANTIZER) for name in info["missing_keys"]):
        raise ValueError(NO_QUANTIZER)
    check_defaults(model.generation_config, Path(path))
    check_decoder(model)
    add_bottleneck_token(model, processor.tokenizer)
    if mgvq is not None:
        load_quantizer(model, mgvq)
    processor.fitted_to(model.config)
    model.image_processor = processor.image_processor
    return model, processor


@torch.no_grad()
def put_in(model: Any, compressor: Mapping[str, Any], image_processor: Any = None) -> Any:
    """Turn a stock model into ours, in place: with new weights of the compressor, and without a bottleneck token yet.

    image_processor: whose normalisation anchors undo; None: CLIP's. ValueError for families and methods that it cannot be.
    """
    classes = classes_of(model.config.model_type)
    check_method(compressor, classes.model.__name__)
    config = model.config
    config.__class__ = classes.config
    config.compressor, config.bottleneck_token_id = dict(compressor), None
    config.image_mean = None if image_processor is None else list(image_processor.image_mean)
    config.image_std = None if image_processor is None else list(image_processor.image_std)
    check_settings(config)
    model.__class__ = classes.model
    like = model.get_input_embeddings().weight
    model.add_compressor()
    for name, module in model.model.compressor.named_modules():
        if not name.startswith("quantizer"):  # whose weights come from a file
            model._init_weights(module)
    model.model.compressor.to(like.device, like.dtype)
    return model
