"""Stores of a tiny model, and images to fill them with."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from htc_vlm import CompressedImages, ImageStore

from .. import tiny_runs as tiny


def open_store(path: Path, dtype: str = "model", **options: Any) -> ImageStore:
    return ImageStore.open(path, *tiny.loaded(tiny.VOCO), dtype, **options)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    tiny.noise(seed).save(out, "PNG")
    return out.getvalue()


def some(n: int, seed: int = 0) -> tuple[list[str], CompressedImages]:
    """n ids and images as if they had been compressed, spread over all shards; quicker than a model."""
    model, _ = tiny.loaded(tiny.VOCO)
    shape = (n, tiny.N_LAYERS, 2, tiny.N_KV_HEADS, 1, tiny.HEAD_DIM)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ids = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(n)]
    return ids, CompressedImages(kv, model.recipe().digest, tiny.N_PATCHES)


def flip(path: Path, needle: bytes, at: int = 0) -> None:
    """Change one bit of the bytes `needle`, wherever they stand in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(needle) + at] ^= 1
    path.write_bytes(content)


def shard(store: ImageStore, id: str) -> Path:
    return store.path / f"{id[0]}.sqlite"
