"""Knows the shapes of seven public models: visual tokens of a picture of any size, and the widths of the decoder.

Source:  config.json and preprocessor_config.json of llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-vicuna-7b-hf,
         llava-hf/llava-onevision-qwen2-7b-ov-hf, OpenGVLab/InternVL3-8B-hf, HuggingFaceTB/SmolVLM2-2.2B-Instruct,
         Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct; tokens are counted by transformers' own processors.
Differs: no weights and no files; numbers of a fine-tuned or re-packed checkpoint may be others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from htc_vlm.applied import families
from htc_vlm.compressors import Compressor
from htc_vlm.ops.cost import LLAMA_7B, DecoderShape

QWEN_7B = {"width": 3584, "mlp_width": 18944, "n_layers": 28, "n_heads": 28, "n_kv_heads": 4, "head_dim": 128}


@dataclass(frozen=True)
class TrueShape:
    """visual_tokens (height, width) -> P of a picture. tile: tokens of one tile, where a picture of several has no grid."""

    family: type[families.Family]
    decoder: DecoderShape
    visual_tokens: Callable[[int, int], int]
    has_axes: bool = False
    tile: int | None = None

    def refusal(self, method: Compressor, n_patches: int) -> str | None:
        """Why the method does not act on a picture of n_patches tokens; None where it does."""
        if method.NEEDS_GRID and self.tile is not None and n_patches != self.tile:
            return f"{method.name} needs a grid of patches, which {n_patches // self.tile} tiles do not have in common"
        return self.family.refusal(method, self.family.name, self.has_axes)


def next_tokens(height: int, width: int) -> int:
    """LLaVA-NeXT: an overview, and up to four tiles of 336 pixels cut to the picture's shape, a newline after each row.

    >>> next_tokens(672, 672), next_tokens(480, 640)
    (2928, 2340)
    """
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    like: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints), patch_size=14, num_additional_image_tokens=0
    )
    like._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(like)
    return int(LlavaNextProcessor._get_number_of_features(like, height, width, 336, 336))


def onevision_tokens(height: int, width: int) -> int:
    """LLaVA-OneVision: an overview of 27 x 27 and tiles of 384 pixels, resized so that they are at most nine.

    >>> onevision_tokens(384, 384)
    1485
    """
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    pinpoints = [[384 * rows, 384 * columns] for rows, columns in itertools.product(range(1, 7), repeat=2)]
    like: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    like._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(like)
    return int(LlavaOnevisionProcessor._get_number_of_features(like, height, width, 384, 384))


def internvl_tokens(height: int, width: int) -> int:
    """InternVL3: up to 12 tiles of 448 pixels and, where there are several, a thumbnail; 256 tokens each.

    >>> internvl_tokens(448, 448), internvl_tokens(448, 896)
    (256, 768)
    """
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
    return 256 * (rows * columns + (rows * columns > 1))


def smolvlm_tokens(height: int, width: int) -> int:
    """SmolVLM 2.2B: the longer side becomes 1536 pixels, tiles of 384 and an overview have 81 tokens each.

    >>> smolvlm_tokens(512, 512)
    1377
    """
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    processor = SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384})
    n_tiles = processor.get_number_of_image_patches(height, width)[0]
    return 81 * max(1, n_tiles)


def qwen_tokens(cell: int, least: int, most: int) -> Callable[[int, int], int]:
    """Qwen-VL: a token for each square of `cell` pixels, of a picture with `least` to `most` pixels.

    >>> qwen_tokens(28, 3136, 12845056)(480, 640)
    391
    """

    def tokens(height: int, width: int) -> int:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        tall, wide = smart_resize(height, width, factor=cell, min_pixels=least, max_pixels=most)
        return int((tall // cell) * (wide // cell))

    return tokens


SHAPES: dict[str, TrueShape] = {
    "llava-1.5-7b": TrueShape(families.Llava, LLAMA_7B, lambda height, width: 576),
    "llava-1.6-vicuna-7b": TrueShape(families.LlavaNext, LLAMA_7B, next_tokens),
    "llava-onevision-qwen2-7b": TrueShape(
        families.LlavaOnevision, DecoderShape(**QWEN_7B, n_vocabulary=152000), onevision_tokens
    ),
    "internvl3-8b": TrueShape(families.InternVL, DecoderShape(**QWEN_7B, n_vocabulary=151674), internvl_tokens, tile=256),
    "smolvlm-2.2b": TrueShape(
        families.SmolVLM,
        DecoderShape(
            width=2048, mlp_width=8192, n_layers=24, n_heads=32, n_kv_heads=32, head_dim=64, n_vocabulary=49280
        ),
        smolvlm_tokens,
        tile=81,
    ),
    "qwen2.5-vl-7b": TrueShape(
        families.QwenVL, DecoderShape(**QWEN_7B, n_vocabulary=152064), qwen_tokens(28, 3136, 12845056), has_axes=True
    ),
    "qwen3-vl-8b": TrueShape(
        families.Qwen3VL,
        DecoderShape(
            width=4096, mlp_width=12288, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128, n_vocabulary=151936
        ),
        qwen_tokens(32, 65536, 16777216),
        has_axes=True,
    ),
}  # fmt: skip
