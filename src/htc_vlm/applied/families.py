"""Knows what differs between families of vision-language models, for `apply`: where features come from, grids, axes.

Source:  transformers 5.23, what its vision-language models have in common: get_decoder, config.image_token_id,
         get_image_features with one tensor for each image (read and tested: LLaVA, LLaVA-NeXT, LLaVA-OneVision, InternVL,
         SmolVLM / Idefics3, Qwen2.5-VL, Qwen3-VL).
Differs: a family overrides only what is its own; a model of no known family gets the defaults if it answers to those names.
         Methods before the language model see the visual tokens as the decoder was to get them, after the projector;
         LLaVA's see the vision tower's features as well, as the papers' codes do. An image of LLaVA-NeXT and LLaVA-OneVision
         is all its tiles with their newlines, one of InternVL or SmolVLM all its tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from htc_vlm.applied import hf_compat
from htc_vlm.compressors import Compressor

OURS = "htc_vlm_"  # begins the model types of families with a bottleneck


class Family:
    """The defaults: images of any length, tokens taken at the decoder's door, no grid."""

    name: ClassVar[str] = "any"
    model_types: ClassVar[tuple[str, ...]] = ()
    tower_acts: ClassVar[bool] = False  # may a method act in the vision tower?
    tower: ClassVar[str] = "its vision tower has no place for methods here"
    tile_marks: ClassVar[bool] = False  # does the prompt have marks between the tiles of a picture?
    grid: ClassVar[str | None] = "it is not known where in the picture its tokens are"  # why there is none; None: there is
    tells_pictures: ClassVar[bool] = True  # does get_image_features give one tensor for each picture?

    def __init__(self, model: Any) -> None:
        self.model = model
        self.headless = model.base_model
        self.decoder = model.get_decoder()
        self.text_config = model.config.get_text_config()

    @property
    def n_patches(self) -> int | None:
        """P, where each image has the same number of tokens; None where it differs."""
        return None

    @property
    def n_layers(self) -> int:
        return int(self.text_config.num_hidden_layers)

    @property
    def has_axes(self) -> bool:
        """Are positions (time, row, column) instead of one number (M-RoPE)?"""
        return "mrope_section" in (getattr(self.text_config, "rope_parameters", None) or {})

    def grid_of(self, n_patches: int, position: Tensor | None) -> tuple[int, int] | None:
        """(rows, columns) of one image's tokens. position (axes, 1, n_patches): where there are axes. None: no grid."""
        return None

    def size_of(self, number: int, images: Mapping[str, Any]) -> tuple[int, ...]:
        """What decides the positions of a picture's tokens, beside their number. images: what get_image_features is given."""
        return ()

    def positions_of(self, size: tuple[int, ...]) -> Tensor | None:
        """(axes, N) positions of a picture's tokens where what follows the picture is at 0; None: counted up to -1."""
        return None

    def whole_pictures(self, lengths: Sequence[int], images: Mapping[str, Any]) -> list[Tensor]:
        """(3, height, width) normalised pixels of each whole picture, from those that the model was given.

        lengths: tokens of each picture.
        """
        raise ValueError(f"where the whole picture is in the pixels of {type(self.model).__name__} is not known; use voco")

    def check(self, method: Compressor) -> None:
        """ValueError for a method that cannot act on this family, saying what does."""
        reason = self.refusal(method, type(self.model).__name__, self.has_axes)
        if reason is not None:
            raise ValueError(reason)

    @classmethod
    def refusal(cls, method: Compressor, model: str, has_axes: bool) -> str | None:
        """Why a method cannot act on a model of this family, and what does; None where it can."""
        instead = "use divprune, random_drop, or tome with place='after_tower' and metric='features'"
        if method.picture_side is not None and not cls.tower_acts:
            return (
                f"{method.name} shrinks the picture for a tower of one resolution; shrink it before the processor of {model}, "
                "which makes fewer tokens of it"
            )
        if method.acts_in_tower and not cls.tower_acts:
            return (
                f"{method.name} acts in a CLIP tower whose patches go straight to the projector (LLaVA's); in {model} "
                f"{cls.tower}; {instead}"
            )
        if method.needs_distance and has_axes:
            return (
                f"{method.name} (plus) divides by what rotation leaves at a distance, which is three numbers with M-RoPE, as "
                f"{model} has it; use sparse_vlm without plus"
            )
        if method.NEEDS_GRID and cls.grid is not None:
            return f"{method.name} needs a grid of patches; in {model} {cls.grid}; {instead}"
        return None


class Llava(Family):
    """LLaVA and ours: every image has P patches, methods act before the projector or in a CLIP tower."""

    name = "llava"
    model_types = ("llava", "htc_vlm")
    tower_acts = True
    grid = None

    @property
    def n_patches(self) -> int | None:
        return hf_compat.n_patches(self.model.config)


class LlavaNext(Family):
    """Tiles are cut to the picture's shape and get a newline after each row."""

    name = "llava_next"
    model_types = ("llava_next",)
    tower = "tiles are cut to the picture's shape after the projector, for which each tile must keep its grid"
    grid = "an image is an overview and tiles with newlines"

    def whole_pictures(self, lengths: Sequence[int], images: Mapping[str, Any]) -> list[Tensor]:
        pixels: Tensor = images["pixel_values"]
        if pixels.ndim != 5:
            raise ValueError(f"pixel_values must be (pictures, tiles, 3, height, width), got {tuple(pixels.shape)}")
        return list(pixels[:, 0])  # the overview comes first


class LlavaOnevision(LlavaNext):
    """As LLaVA-NeXT, on SigLIP."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    tower = "tiles of a SigLIP tower (no class token) are cut to the picture's shape, for which each must keep its grid"


class InternVL(Family):
    """An image is a run of tiles, each a square of tokens after pixel shuffle."""

    name = "internvl"
    model_types = ("internvl",)
    tower = "pixel shuffle needs each tile's whole grid after the tower"
    grid = None
    tells_pictures = False

    @property
    def n_tile(self) -> int:
        """Tokens of one tile."""
        vision = self.model.config.vision_config
        sides = [size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)]
        return int(math.prod(sides) * self.model.config.downsample_ratio**2)

    def whole_pictures(self, lengths: Sequence[int], images: Mapping[str, Any]) -> list[Tensor]:
        return last_tiles(images["pixel_values"], [n // self.n_tile for n in lengths])

    def grid_of(self, n_patches: int, position: Tensor | None) -> tuple[int, int] | None:
        return grid_of_one_tile(n_patches, self.n_tile, "InternVL", "crop_to_patches=False")


class SmolVLM(Family):
    """SmolVLM and Idefics3: tiles and an overview, each a square of tokens after pixel shuffle, with marks between them."""

    name = "smolvlm"
    model_types = ("smolvlm", "idefics3")
    tower = "pixel shuffle needs each tile's whole grid after the tower"
    tile_marks = True
    grid = None
    tells_pictures = False

    def whole_pictures(self, lengths: Sequence[int], images: Mapping[str, Any]) -> list[Tensor]:
        tiles = images["pixel_values"].flatten(0, 1)
        tiles = tiles[(tiles != 0).flatten(1).any(dim=1)]  # the others are padding
        return last_tiles(tiles, [n // self.n_tile for n in lengths])

    @property
    def n_tile(self) -> int:
        """Tokens of one tile."""
        config = self.model.config
        return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2)

    def grid_of(self, n_patches: int, position: Tensor | None) -> tuple[int, int] | None:
        return grid_of_one_tile(n_patches, self.n_tile, type(self.model).__name__, "do_image_splitting=False")


class QwenVL(Family):
    """Qwen2.5-VL and Qwen2-VL: pictures at their own size; positions are (time, row, column)."""

    name = "qwen2_5_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_vl")
    tower = "the tower (no class token) merges 2 x 2 patches at its end, for which each picture must keep its grid"
    grid = None

    def grid_of(self, n_patches: int, position: Tensor | None) -> tuple[int, int] | None:
        if position is None:
            raise ValueError("the picture's rows and columns are read from M-RoPE positions; give mm_token_type_ids")
        rows, columns = (int(axis.max() - axis.min()) + 1 for axis in position[-2:])
        if rows * columns != n_patches:
            raise ValueError(f"{n_patches} tokens are no picture of {rows} x {columns}; videos are not supported")
        return rows, columns


    def size_of(self, number: int, images: Mapping[str, Any]) -> tuple[int, ...]:
        """Frames, rows and columns of a picture's tokens."""
        merge = self.model.config.vision_config.spatial_merge_size
        frames, height, width = (int(n) for n in images["image_grid_thw"][number])
        return frames, height // merge, width // merge

    def positions_of(self, size: tuple[int, ...]) -> Tensor | None:
        axes = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
        return torch.stack(axes).flatten(1) - max(size[1:])  # text goes on behind the longer side

    def whole_pictures(self, lengths: Sequence[int], images: Mapping[str, Any]) -> list[Tensor]:
        vision = self.model.config.vision_config
        merge, patch, frames = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        rows = images["pixel_values"].split([n * merge**2 for n in lengths])
        pictures = []
        for number, flat in enumerate(rows):
            _, height, width = self.size_of(number, images)
            blocks = flat.view(height, width, merge, merge, -1, frames, patch, patch)[..., 0, :, :]
            pictures.append(blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, height * merge * patch, width * merge * patch))
        return pictures


class Qwen3VL(QwenVL):
    """As Qwen2.5-VL; the first layers add deeper features of the tower, which leave with their tokens."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)


def grid_of_one_tile(n_patches: int, n_tile: int, model: str, option: str) -> tuple[int, int]:
    """(rows, columns) of an image of one square tile; ValueError for several, naming the processor's option for one."""
    if n_patches != n_tile:
        raise ValueError(
            f"this image is {n_patches // n_tile} tiles of {model}, which have no common grid; give the processor {option} "
            "(one tile), or use divprune or random_drop"
        )
    return math.isqrt(n_tile), math.isqrt(n_tile)


def last_tiles(tiles: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """(tiles, 3, height, width) of pictures that have so many each -> the last of each, which shows the whole picture.

    >>> [int(tile) for tile in last_tiles(torch.arange(5), [1, 3, 1])]
    [0, 3, 4]
    """
    return [tiles[end - 1] for end in itertools.accumulate(counts)]


KNOWN: tuple[type[Family], ...] = (Llava, LlavaNext, LlavaOnevision, InternVL, SmolVLM, QwenVL, Qwen3VL)


def family_of(model: Any) -> Family:
    """The family of a model; the defaults for one that is not known. ValueError naming what a model lacks for them."""
    lacks = [
        name
        for name, has in (
            ("get_decoder", hasattr(model, "get_decoder")),
            ("config.image_token_id", hasattr(getattr(model, "config", None), "image_token_id")),
            ("get_image_features", hasattr(getattr(model, "base_model", None), "get_image_features")),
        )
        if not has
    ]
    if lacks:
        raise ValueError(
            f"apply works on vision-language models of transformers, e.g. a LlavaForConditionalGeneration; got "
            f"{type(model).__name__}, which lacks {', '.join(lacks)}"
        )
    if isinstance(model, LlavaForConditionalGeneration):
        return Llava(model)
    return family_class(model.config.model_type)(model)


def family_class(model_type: str) -> type[Family]:
    """The family of a model type, of ours with a bottleneck (`htc_vlm_internvl`) too; the defaults where it is not known."""
    stock = model_type.removeprefix(OURS)
    return next((family for family in KNOWN if stock in family.model_types), Family)
