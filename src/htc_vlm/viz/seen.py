"""The square of a picture that a model saw: what maps of patches are laid over."""

from __future__ import annotations

import numpy as np
from PIL import Image

from htc_vlm.data.images import pad_to_square
from htc_vlm.model.modeling import HtcVlmForConditionalGeneration
from htc_vlm.model.processing import HtcVlmProcessor


def seen_by_model(model: HtcVlmForConditionalGeneration, processor: HtcVlmProcessor, picture: Image.Image) -> Image.Image:
    """The square that the vision tower gets, cut as the processor cuts it, at its own resolution; padded pictures at theirs."""
    if getattr(processor.image_processor, "do_pad", False):
        return pad_to_square(picture.convert("RGB"), fill=(127, 127, 127))
    pixels = model.model.denormalise(processor(images=[picture], return_tensors="pt")["pixel_values"].to(model.device))
    return Image.fromarray((pixels[0].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8))
