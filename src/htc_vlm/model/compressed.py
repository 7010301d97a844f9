"""Compressed images: the keys and values of their bottleneck tokens, ready to be asked about anywhere in any prompt.

Source:  VoCo-LLaMA section 3.4 (re-use of the cached token), HTC-VLM section 4.2.
Differs: keys are stored rotated to position 0, so that placing an image is one rotation; a fingerprint of weights and
         settings ties the kv to the model that made them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from htc_vlm.files import replacing

FORMAT = "htc-vlm compressed images 1"


@dataclass(frozen=True)
class CompressedImages:
    """N images as cache entries.

    kv (N, layers, 2, kv heads, K, head_dim): [:, :, 0] keys, rotated as if the first bottleneck token stood at
        position 0 (the k-th at k); [:, :, 1] values.
    fingerprint: of the weights and settings of the model that made them.
    n_visual: C, how many visual tokens each image had; sequential numbering leaves that many positions free for it.
    """

    kv: Tensor
    fingerprint: str
    n_visual: int

    def __post_init__(self) -> None:
        if self.kv.ndim != 6 or self.kv.shape[2] != 2:
            raise ValueError(
                f"kv must be (N images, layers, 2, kv heads, K, head_dim), got shape {tuple(self.kv.shape)}"
            )

    def __len__(self) -> int:
        return self.kv.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int]) -> CompressedImages:
        """Images by number, slice or list of numbers; always a CompressedImages."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
            index = [index % len(self)]
        kv = self.kv[index] if isinstance(index, slice) else self.kv[list(index)]
        return CompressedImages(kv, self.fingerprint, self.n_visual)

    def __iter__(self) -> Iterator[CompressedImages]:
        return (self[i] for i in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of all kv."""
        return self.kv.numel() * self.kv.element_size()

    @property
    def n_bottleneck(self) -> int:
        """K"""
        return self.kv.shape[4]

    def to(self, *args: Any, **kwargs: Any) -> CompressedImages:
        """Like Tensor.to: move or change the dtype of the kv."""
        return CompressedImages(self.kv.to(*args, **kwargs), self.fingerprint, self.n_visual)

    @classmethod
    def concat(cls, parts: Sequence[CompressedImages]) -> CompressedImages:
        """All images of `parts`, in order. ValueError when they come from different models."""
        if not parts:
            raise ValueError("nothing to concatenate; give at least one CompressedImages")
        first = parts[0]
        for part in parts[1:]:
            if (part.fingerprint, part.n_visual) != (first.fingerprint, first.n_visual):
                raise ValueError(
                    f"images of different models cannot be put together: {first.fingerprint} and {part.fingerprint}; "
                    "compress all of them with one model"
                )
        return cls(torch.cat([part.kv for part in parts]), first.fingerprint, first.n_visual)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing file is replaced only when the new one is complete."""
        path = Path(path)
        meta = {"format": FORMAT, "about": json.dumps({"fingerprint": self.fingerprint, "n_visual": self.n_visual})}
        with replacing(path) as partial:
            save_file({"kv": self.kv.contiguous()}, partial, metadata=meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> CompressedImages:
        """Read what `save` wrote. FileNotFoundError, or ValueError for a foreign or damaged file, naming it."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of compressed images")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                meta = file.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: not a file of compressed images (format {meta.get('format')!r}, "
                        f"expected {FORMAT!r}); make one with `htc-vlm compress` or CompressedImages.save"
                    )
                about = json.loads(meta["about"])
                kv = file.get_tensor("kv")
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{path}: damaged file of compressed images ({error}); compress the pictures again"
            ) from error
        if not torch.isfinite(kv).all():
            raise ValueError(f"{path}: damaged file of compressed images (values that are not finite); compress again")
        return cls(kv, str(about["fingerprint"]), int(about["n_visual"]))

    def check_made_by(self, fingerprint: str) -> None:
        """ValueError unless `fingerprint` is that of the model that made these images."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"these images were compressed by another model or with other settings (theirs {self.fingerprint}, "
                f"this model {fingerprint}); compress the pictures again with this model"
            )
