"""What a picture quantizer is to the methods that read its code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htc_vlm.registry import Registry


class Encoding(Protocol):
    """A batch of codes: `latents` and `quantized` (B, C, h, w)."""

    @property
    def latents(self) -> Tensor: ...

    @property
    def quantized(self) -> Tensor: ...


class Quantizer(nn.Module):
    """A picture (B, 3, H, W) becomes a grid of codes (B, C, h, w). Subclasses are registered by name."""

    name: ClassVar[str]
    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {}  # name -> arguments of the class

    @classmethod
    def pixels_per_cell(cls, **options: Any) -> int:
        """Pixels per grid cell and side of a quantizer with these arguments; known before it is made."""
        raise NotImplementedError(f"{cls.__name__}.pixels_per_cell")

    @property
    def channels(self) -> int:
        """C"""
        raise NotImplementedError(f"{type(self).__name__}.channels")

    def encode(self, pixels: Tensor) -> Encoding:
        """(B, 3, H, W) in [-1, 1] -> latents and quantized (B, C, H / f, W / f)."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def drop_decoder(self) -> None:
        """Forget what only decoding needs."""

    @classmethod
    def read_weights(cls, path: Path) -> dict[str, Tensor]:
        """The state dict in a safetensors or torch file, or what else this quantizer's weights come as.

        FileNotFoundError where there is none.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no weights of quantizer {cls.name} there")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))


QUANTIZERS: Registry[Quantizer] = Registry("quantizer", group="htc_vlm.quantizers", base=Quantizer)


def resolve(name: str = "mgvq", preset: str | None = None, **options: Any) -> tuple[type[Quantizer], dict[str, Any]]:
    """A quantizer's class and its arguments, those of the preset filled in. ValueError names what is known."""
    cls = QUANTIZERS.get(name)
    if preset is not None and preset not in cls.PRESETS:
        known = ", ".join(sorted(cls.PRESETS)) or "none"
        raise ValueError(f"quantizer preset is {preset!r}; known: {known}")
    made = {**cls.PRESETS[preset], **options} if preset is not None else options
    known_options = list(inspect.signature(cls).parameters)
    unknown = sorted(set(made) - set(known_options))
    if unknown:
        raise ValueError(f"quantizer {name} has no option {unknown[0]!r}; known: {', '.join(known_options) or 'none'}")
    return cls, made


def signed_pixels(unit_pixels: Tensor, size: int | None = None) -> Tensor:
    """Pixels in [0, 1], (B, 3, H, W) -> [-1, 1] as quantizers take them, resized to `size` x `size` when given.

    A whole-number reduction averages blocks (320 -> 160: the mean of 2 x 2); any other size is antialiased bilinear.

    >>> signed_pixels(torch.tensor([0.0, 0.5, 1.0, 0.5]).expand(1, 3, 4, 4), 2)[0, 0].tolist()
    [[-0.5, 0.5], [-0.5, 0.5]]
    """
    height, width = unit_pixels.shape[-2:]
    if size is not None and (height, width) != (size, size):
        if height % size == 0 and width % size == 0:
            unit_pixels = F.avg_pool2d(unit_pixels, (height // size, width // size))
        else:
            unit_pixels = F.interpolate(unit_pixels, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    return unit_pixels * 2 - 1
