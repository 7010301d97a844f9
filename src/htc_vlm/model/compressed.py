"""Compressed images: the keys and values of their bottleneck tokens, ready to be asked about anywhere in any prompt.

Source:  VoCo-LLaMA section 3.4 (re-use of the cached token), HTC-VLM section 4.2.
Differs: keys are stored rotated to position 0, so that placing an image is one rotation; the recipe ties the images to what
         made them; files carry a checksum of each image, since a flipped bit would change answers and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor

from htc_vlm.files import replacing
from htc_vlm.model.packing import Levels, Packed, Shape, pack

FORMAT = "htc-vlm compressed images 2"
FIRST_FORMAT = "htc-vlm compressed images 1"
CHECK_BYTES = 16


class CompressedImages:
    """N images as cache entries.

    kv (N, layers, 2, kv heads, K, head_dim): [:, :, 0] keys, rotated as if the first bottleneck token stood at
        position 0 (the k-th at k); [:, :, 1] values. Of packed images: unpacked anew each time it is asked for, float32.
    recipe: 64 hex digits of what made them, see recipe.py.
    n_visual: C of each image, how many visual tokens it had; sequential numbering leaves that many positions free for it.
    maps (N, P) uint8 or None: where the bottleneck looked, a byte a patch in reading order, 255 at each image's most.
    prompt: of images cached without a bottleneck, what they were read in and by which method (prefix_cache.py); JSON. Their
        kv begin with the prompt's text before the image, and n_visual counts the positions of all of it.
    """

    def __init__(
        self,
        kv: Tensor | Packed,
        recipe: str,
        n_visual: int | Sequence[int],
        maps: Tensor | None = None,
        prompt: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(kv, Tensor) and (kv.ndim != 6 or kv.shape[2] != 2):
            raise ValueError(f"kv must be (N images, layers, 2, kv heads, K, head_dim), got shape {tuple(kv.shape)}")
        self._kv = kv
        self.recipe = str(recipe)
        self.n_visual: tuple[int, ...] = (n_visual,) * len(self) if isinstance(n_visual, int) else tuple(map(int, n_visual))
        self.maps = maps
        self.prompt = prompt
        if len(self.n_visual) != len(self):
            raise ValueError(f"{len(self.n_visual)} counts of visual tokens for {len(self)} images")
        if maps is not None and (maps.ndim != 2 or len(maps) != len(self) or maps.dtype != torch.uint8):
            raise ValueError(f"maps must be ({len(self)}, P) uint8, got {tuple(maps.shape)} {maps.dtype}")

    def __len__(self) -> int:
        return len(self._kv.rows if isinstance(self._kv, Packed) else self._kv)

    def __repr__(self) -> str:
        return f"CompressedImages({len(self)} images of {self.shape} as {self.dtype}, recipe {self.recipe[:16]}...)"

    @property
    def kv(self) -> Tensor:
        return self._kv.unpack() if isinstance(self._kv, Packed) else self._kv

    @property
    def packed(self) -> Packed | None:
        """The rows of bytes of int8, int4 and int2; None for images in the model's own dtype."""
        return self._kv if isinstance(self._kv, Packed) else None

    @property
    def shape(self) -> Shape:
        """(layers, 2, kv heads, K, head_dim) of one image."""
        layers, two, heads, n_bottleneck, head_dim = (
            self._kv.shape if isinstance(self._kv, Packed) else self._kv.shape[1:]
        )
        return layers, two, heads, n_bottleneck, head_dim

    @property
    def dtype(self) -> str:
        """"model" (a floating dtype, that of `kv`), "int8", "int4" or "int2"."""
        return self._kv.dtype if isinstance(self._kv, Packed) else "model"

    @property
    def n_bottleneck(self) -> int:
        """K"""
        return self.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: of the keys and values as packed, and of the maps. int2's levels, which all images
        share, are not counted."""
        stored = self._kv.rows if isinstance(self._kv, Packed) else self._kv
        return stored.numel() * stored.element_size() + (0 if self.maps is None else self.maps.numel())

    def __getitem__(self, index: int | slice | Sequence[int]) -> CompressedImages:
        """Images by number, slice or list of numbers; always a CompressedImages."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
            index = [index % len(self)]
        numbers = range(len(self))[index] if isinstance(index, slice) else list(index)
        at = index if isinstance(index, slice) else list(index)
        kv: Tensor | Packed
        if isinstance(self._kv, Packed):
            kv = Packed(self._kv.dtype, self._kv.rows[at], self._kv.shape, self._kv.levels)
        else:
            kv = self._kv[at]
        n_visual = [self.n_visual[i] for i in numbers]
        return CompressedImages(kv, self.recipe, n_visual, None if self.maps is None else self.maps[at], self.prompt)

    def __iter__(self) -> Iterator[CompressedImages]:
        return (self[i] for i in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> CompressedImages:
        """Like Tensor.to: move the images, or change the dtype of those that are not packed."""
        if not isinstance(self._kv, Packed):
            return CompressedImages(self._kv.to(*args, **kwargs), self.recipe, self.n_visual, self.maps, self.prompt)
        device = torch.empty(0, device=self._kv.rows.device).to(*args, **kwargs).device
        kv = Packed(self._kv.dtype, self._kv.rows.to(device), self._kv.shape, self._kv.levels)
        return CompressedImages(kv, self.recipe, self.n_visual, self.maps, self.prompt)

    def as_dtype(self, dtype: str, levels: Levels | None = None) -> CompressedImages:
        """The same images stored as "int8", "int4", "int2" (with `levels`), or unpacked as "model" (float32).

        What was rounded away does not come back: packing again, or to fewer bits, is allowed; see packing.py.
        """
        if dtype == "model":
            return CompressedImages(self.kv, self.recipe, self.n_visual, self.maps, self.prompt)
        if dtype == self.dtype and levels is None:
            return self
        return CompressedImages(pack(self.kv, dtype, levels), self.recipe, self.n_visual, self.maps, self.prompt)

    def with_maps(self, maps: Tensor | None) -> CompressedImages:
        """The same images with other maps, or without."""
        return CompressedImages(self._kv, self.recipe, self.n_visual, maps, self.prompt)

    @classmethod
    def concat(cls, parts: Sequence[CompressedImages]) -> CompressedImages:
        """All images of `parts`, in order; with maps where all parts have them. ValueError for other recipes or dtypes."""
        if not parts:
            raise ValueError("nothing to concatenate; give at least one CompressedImages")
        first = parts[0]
        for part in parts[1:]:
            if part.recipe != first.recipe:
                raise ValueError(
                    f"images of different models cannot be put together: {first.recipe} and {part.recipe}; "
                    "compress all of them with one model"
                )
            if part.dtype == first.dtype and part.n_bottleneck != first.n_bottleneck:
                raise ValueError(
                    f"images of {first.n_bottleneck} and {part.n_bottleneck} entries do not fit one tensor; keep them in an "
                    "ImageStore (htc-vlm store add), or fix the number of tokens with the method's own setting"
                )
            if (part.dtype, part.shape, _levels_digest(part)) != (first.dtype, first.shape, _levels_digest(first)):
                raise ValueError(f"{part!r} cannot be put together with {first!r}; store all of them as one dtype")
        maps = [part.maps for part in parts if part.maps is not None]
        joined_maps = torch.cat(maps) if len(maps) == len(parts) else None
        n_visual = [count for part in parts for count in part.n_visual]
        if isinstance(first._kv, Packed):
            rows = torch.cat([part._kv.rows for part in parts if isinstance(part._kv, Packed)])
            kv: Tensor | Packed = Packed(first._kv.dtype, rows, first._kv.shape, first._kv.levels)
        else:
            kv = torch.cat([part._kv for part in parts if isinstance(part._kv, Tensor)])
        return cls(kv, first.recipe, n_visual, joined_maps, first.prompt)

    def check_made_by(self, recipe: str) -> None:
        """ValueError unless `recipe` is that of the model that made these images."""
        if self.recipe != str(recipe):
            raise ValueError(
                f"these images were compressed by another model or with other settings (theirs {self.recipe[:16]}..., "
                f"this model {str(recipe)[:16]}...); compress the pictures again with this model"
            )

    # ------------------------------------------------------------------------------------------------------------ files
    def row_bytes(self) -> list[bytes]:
        """The keys and values of each image as stored."""
        stored = self._kv.rows if isinstance(self._kv, Packed) else self._kv.detach().flatten(1)
        stored = stored.contiguous().view(torch.uint8) if stored.numel() else stored
        return [row.tobytes() for row in stored.cpu().numpy()]

    def map_bytes(self) -> list[bytes]:
        """The map of each image as stored; empty without."""
        return [b""] * len(self) if self.maps is None else [row.tobytes() for row in self.maps.cpu().numpy()]

    def checks(self) -> list[bytes]:
        """A checksum of each image, its count of visual tokens, its map and the recipe included."""
        rows = zip(self.row_bytes(), self.map_bytes(), self.n_visual, strict=True)
        return [checksum(self.recipe.encode(), kv, seen, n_visual) for kv, seen, n_visual in rows]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing file is replaced only when the new one is complete.

        OSError that names the file where it cannot be written; nothing is left behind then.
        """
        path = Path(path)
        tensors = {"checks": torch.tensor([list(check) for check in self.checks()], dtype=torch.uint8).reshape(-1, CHECK_BYTES)}
        about: dict[str, Any] = {"recipe": self.recipe, "n_visual": self.n_visual, "dtype": self.dtype, "shape": self.shape}
        if self.prompt is not None:
            about["prompt"] = self.prompt
        if isinstance(self._kv, Packed):
            tensors["rows"] = self._kv.rows.contiguous()
            if self._kv.levels is not None:
                tensors["levels"] = self._kv.levels.values.contiguous()
                about["levels"] = self._kv.levels.digest
        else:
            tensors["kv"] = self._kv.detach().contiguous()
        if self.maps is not None:
            tensors["maps"] = self.maps.contiguous()
        written = json.dumps(about)
        meta = {"format": FORMAT, "about": written, "check": hashlib.sha256(written.encode()).hexdigest()}
        with replacing(path) as partial:
            partial.write_bytes(tensors_as_bytes(tensors, metadata=meta))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> CompressedImages:
        """Read what `save` wrote. FileNotFoundError, or ValueError for a foreign or damaged file, naming it."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of compressed images")
        content = Path(path).read_bytes()
        try:
            meta = _metadata(content)
            if meta.get("format") == FORMAT:
                images = _from_tensors(read_tensors(content), meta)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: damaged file of compressed images ({reason}); compress the pictures again") from error
        if meta.get("format") == FIRST_FORMAT:
            raise ValueError(
                f"{path}: compressed images of the first format, which does not say what made them (adapters, the image "
                "processor); compress the pictures again with `htc-vlm compress`"
            )
        if meta.get("format") != FORMAT:
            raise ValueError(
                f"{path}: not a file of compressed images (format {meta.get('format')!r}, "
                f"expected {FORMAT!r}); make one with `htc-vlm compress` or CompressedImages.save"
            )
        return images.to(device)


def check_images(compressed: Any) -> None:
    """ValueError for another thing than CompressedImages, a list of them say."""
    if not isinstance(compressed, CompressedImages):
        raise ValueError(
            f"compressed is a {type(compressed).__name__}; give what compress returned (CompressedImages.concat joins several)"
        )


def checksum(key: bytes, kv: bytes, seen: bytes, n_visual: int) -> bytes:
    """16 bytes of SHA-256 over what is stored of one image, and what it belongs to."""
    made = hashlib.sha256(f"{len(key)} {len(kv)} {len(seen)} {n_visual} ".encode())
    for part in (key, kv, seen):
        made.update(part)
    return made.digest()[:CHECK_BYTES]


def _levels_digest(images: CompressedImages) -> str | None:
    levels = images.packed.levels if images.packed is not None else None
    return None if levels is None else levels.digest


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, {} without."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("it is cut short, or no safetensors file")
    header = json.loads(content[8 : 8 + length])
    return dict(header.get("__metadata__") or {})


def _from_tensors(tensors: dict[str, Tensor], meta: dict[str, str]) -> CompressedImages:
    """ValueError where anything is not what was written."""
    if hashlib.sha256(meta["about"].encode()).hexdigest() != meta["check"]:
        raise ValueError("its description does not match its checksum")
    about = json.loads(meta["about"])
    kv: Tensor | Packed
    if about["dtype"] == "model":
        kv = tensors["kv"]
    else:
        levels = Levels(tensors["levels"]) if "levels" in tensors else None
        if levels is not None and levels.digest != about["levels"]:
            raise ValueError("its levels do not match their checksum")
        layers, two, heads, n_bottleneck, head_dim = about["shape"]
        kv = Packed(about["dtype"], tensors["rows"], (layers, two, heads, n_bottleneck, head_dim), levels)
    images = CompressedImages(kv, about["recipe"], about["n_visual"], tensors.get("maps"), about.get("prompt"))
    if list(images.shape) != about["shape"]:
        raise ValueError(f"its images have the shape {images.shape}, its description says {about['shape']}")
    written = [bytes(row.tolist()) for row in tensors["checks"]]
    wrong = [i for i, (now, then) in enumerate(zip(images.checks(), written, strict=True)) if now != then]
    if wrong:
        listed = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise ValueError(f"{len(wrong)} of {len(written)} images do not match their checksums: {listed}")
    if isinstance(kv, Tensor) and not torch.isfinite(kv).all():
        raise ValueError("values that are not finite")
    return images
