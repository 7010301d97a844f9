"""Compressed images on disk: `ImageStore` keeps each picture once, under the SHA-256 of its bytes and the model's recipe."""

from htc_vlm.store.entries import Added, StoredImage
from htc_vlm.store.image_store import ImageStore
from htc_vlm.store.rows import DamagedImageError, UnknownImageError

__all__ = ["Added", "DamagedImageError", "ImageStore", "StoredImage", "UnknownImageError"]
