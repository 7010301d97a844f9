"""A resumable cache on disk of what the frozen vision tower says about every picture.

Source: ours; a frozen tower gives the same patches in every epoch, so it runs once.
Differs: only the channels that depend on the picture are stored, in bfloat16; the position channels are appended on
reading. Beside them, on request, the picture itself at a small size (uint8), for the pixel tokenizer.

A folder holds `meta.json` (what made it), `patches.bf16` (N, P, width), `pictures.u8` (N, S, S, 3) and `done.u8` (N).
An image is marked done only after its rows are written, so the process may be killed at any time, and several
processes may fill different shares of one cache.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from htc_vlm.tiny.tower import EfficientNetLiteModel, position_channels

PIXEL_MEAN, PIXEL_STD = 0.498, 0.502  # what the published weights were trained with, on pixels / 255
PATCHES, PICTURES, DONE, META = "patches.bf16", "pictures.u8", "done.u8", "meta.json"


@dataclass(frozen=True)
class CacheMeta:
    """What a cache holds and which tower made it; two caches are the same only if all of it is.

    width: stored channels per patch, without the `position_dim` that are appended. picture_size: 0 = no pictures.
    """

    n_images: int
    n_patches: int
    width: int
    position_dim: int
    image_size: int
    picture_size: int
    fingerprint: str
    position_scale: float = 1.0


@dataclass(frozen=True)
class Loaded:
    """One picture, ready: pixel_values (3, S, S) float32, normalised; picture (s, s, 3) uint8, or None."""

    pixel_values: torch.Tensor
    picture: np.ndarray | None


@dataclass(frozen=True)
class FillReport:
    n_computed: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.n_computed / self.seconds if self.seconds else 0.0


def fingerprint(tower: EfficientNetLiteModel) -> str:
    """16 hex digits that change with any weight, and any setting that the weights' shapes do not show.

    Of the weights rounded to bfloat16, so that a checkpoint saved in half the bytes finds the cache it was trained with.
    """
    c = tower.config
    settings = ["each map normalised", c.image_size, c.position_dim, c.layer_norm_eps, c.stage_strides, c.stage_depths]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().bfloat16().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def meta_for(tower: EfficientNetLiteModel, n_images: int, picture_size: int = 0) -> CacheMeta:
    """The meta data of a cache of this tower's outputs."""
    config = tower.config
    return CacheMeta(
        n_images=n_images,
        n_patches=config.n_patches,
        width=config.feature_dim,
        position_dim=config.position_dim,
        position_scale=config.position_scale,
        image_size=config.image_size,
        picture_size=picture_size,
        fingerprint=fingerprint(tower),
    )


class FeatureCache:
    """Patch vectors of `meta.n_images` pictures in `folder`, by index; created empty, or opened if it is there.

    Without `meta`, an existing cache is opened as it is. With it, ValueError is raised when the folder holds another
    one (other weights, another image size, other counts).
    """

    def __init__(self, folder: str | Path, meta: CacheMeta | None = None) -> None:
        self.folder = Path(folder)
        meta_file = self.folder / META
        if meta_file.exists():
            self.meta = CacheMeta(**json.loads(meta_file.read_text()))
            if meta is not None and meta != self.meta:
                ours, theirs = asdict(meta), asdict(self.meta)
                differences = {key: (theirs[key], ours[key]) for key in ours if ours[key] != theirs[key]}
                raise ValueError(f"{folder} holds another cache (there, asked for): {differences}; use another folder")
        elif meta is None:
            raise ValueError(f"{folder} holds no cache ({META} is missing); give `meta` to create one")
        else:
            self.meta = meta
            self._create(meta_file)
        sizes = self.meta
        self._patches = self._map(PATCHES, np.int16, (sizes.n_images, sizes.n_patches, sizes.width))
        self._done = self._map(DONE, np.uint8, (sizes.n_images,))
        self._pictures: np.memmap | None = None
        if sizes.picture_size:
            shape = (sizes.n_images, sizes.picture_size, sizes.picture_size, 3)
            self._pictures = self._map(PICTURES, np.uint8, shape)
        n_side = round(sizes.n_patches**0.5)
        self._positions = (sizes.position_scale * position_channels(n_side, n_side, sizes.position_dim)).bfloat16()

    def _create(self, meta_file: Path) -> None:
        """Empty (sparse) arrays first, the meta data last: a folder with meta data is a whole cache."""
        sizes = self.meta
        self.folder.mkdir(parents=True, exist_ok=True)
        n_bytes = {
            PATCHES: 2 * sizes.n_images * sizes.n_patches * sizes.width,
            DONE: sizes.n_images,
            PICTURES: 3 * sizes.n_images * sizes.picture_size**2,
        }
        for name, length in n_bytes.items():
            if length:
                with (self.folder / name).open("wb") as file:
                    file.truncate(length)
        partial = meta_file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(sizes), indent=1) + "\n")
        partial.replace(meta_file)

    def _map(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
        return np.memmap(self.folder / name, dtype=dtype, mode="r+", shape=shape)

    def __len__(self) -> int:
        return self.meta.n_images

    @property
    def n_done(self) -> int:
        return int(self._done.sum())

    def missing(self) -> list[int]:
        """Indices that are not filled yet."""
        return [int(index) for index in np.flatnonzero(self._done == 0)]

    def _rows(self, indices: Sequence[int]) -> np.ndarray:
        """The indices as an array. Raises ValueError for one that is outside or not filled."""
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"indices from {rows.min()} to {rows.max()}; {self.folder} has 0 to {len(self) - 1}")
        absent = rows[self._done[rows] == 0]
        if absent.size:
            raise ValueError(
                f"{absent.size} of {rows.size} images are not in {self.folder} yet, e.g. {absent[:5].tolist()}"
            )
        return rows

    def get(self, indices: Sequence[int]) -> torch.Tensor:
        """(n, P, width + position_dim) bfloat16: what the tower's forward gives for these images."""
        rows = self._rows(indices)
        features = torch.from_numpy(self._patches[rows]).view(torch.bfloat16)  # (n, P, width)
        return torch.cat([features, self._positions.expand(len(rows), -1, -1)], dim=-1)

    def pictures(self, indices: Sequence[int]) -> torch.Tensor:
        """(n, 3, s, s) uint8 RGB. Raises ValueError when the cache was made without pictures."""
        if self._pictures is None:
            raise ValueError(f"{self.folder} was made without pictures: fill a new cache with picture_size > 0")
        return torch.from_numpy(self._pictures[self._rows(indices)]).permute(0, 3, 1, 2)

    def put(self, indices: Sequence[int], features: torch.Tensor, pictures: np.ndarray | None = None) -> None:
        """Store features (n, P, width) and, if the cache has them, pictures (n, s, s, 3) uint8; then mark as done."""
        if (pictures is None) != (self._pictures is None):
            raise ValueError(f"{self.folder} has picture_size {self.meta.picture_size}; pictures must match it")
        rows = np.asarray(indices, dtype=np.int64)
        self._patches[rows] = features.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
        if self._pictures is not None and pictures is not None:
            self._pictures[rows] = pictures
        self._done[rows] = 1

    def flush(self) -> None:
        """Hand everything written so far to the disk, the marks last."""
        self._patches.flush()
        if self._pictures is not None:
            self._pictures.flush()
        self._done.flush()


def load_picture(image: Image.Image, image_size: int, picture_size: int = 0) -> Loaded:
    """Resize straight to a square (bilinear), normalise; keep a second copy of `picture_size` if that is not 0.

    >>> loaded = load_picture(Image.new("RGB", (2, 2), (127, 127, 127)), image_size=4, picture_size=3)
    >>> loaded.pixel_values.shape, loaded.picture.shape, round(float(loaded.pixel_values.abs().max()), 2)
    (torch.Size([3, 4, 4]), (3, 3, 3), 0.0)
    """
    rgb = image.convert("RGB")
    large = np.asarray(rgb.resize((image_size, image_size), Image.Resampling.BILINEAR), dtype=np.float32)
    pixel_values = torch.from_numpy((large / 255 - PIXEL_MEAN) / PIXEL_STD).permute(2, 0, 1)
    picture = None
    if picture_size:
        picture = np.asarray(rgb.resize((picture_size, picture_size), Image.Resampling.BILINEAR))
    return Loaded(pixel_values, picture)


def fill(
    cache: FeatureCache,
    tower: EfficientNetLiteModel,
    picture: Callable[[int], Image.Image],
    *,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
    autocast_dtype: torch.dtype | None = None,
    flush_every: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> FillReport:
    """Compute what is missing; `picture(index)` gives the picture of an index.

    share: (i, n) does every n-th missing image from the i-th, for n processes on one cache. Filling is per image, so
    nothing is wrong if two processes meet. autocast_dtype: torch.bfloat16 is faster only on processors with bfloat16
    units (AMX); without them it is slower than None (float32). on_progress(n computed, n to compute) after each flush.
    Raises ValueError when the tower is not the one that the cache was made for.
    """
    sizes = cache.meta
    if fingerprint(tower) != sizes.fingerprint:
        raise ValueError(f"{cache.folder} was made by tower {sizes.fingerprint}, this one is {fingerprint(tower)}")
    first, n_shares = share
    todo = [index for index in range(first, len(cache), n_shares) if not cache._done[index]]
    tower = tower.to(memory_format=torch.channels_last)
    device = tower.stem.weight.device
    start = time.perf_counter()
    since_flush = 0
    for begin in range(0, len(todo), batch_size):
        indices = todo[begin : begin + batch_size]
        loaded = [load_picture(picture(index), sizes.image_size, sizes.picture_size) for index in indices]
        pixel_values = torch.stack([one.pixel_values for one in loaded]).to(device, memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            features = tower.features(pixel_values)
        pictures = [one.picture for one in loaded if one.picture is not None]
        cache.put(indices, features, np.stack(pictures) if pictures else None)
        since_flush += len(indices)
        if since_flush >= flush_every:
            cache.flush()
            since_flush = 0
            if on_progress is not None:
                on_progress(begin + len(indices), len(todo))
    cache.flush()
    return FillReport(len(todo), time.perf_counter() - start)


__all__ = ["CacheMeta", "FeatureCache", "FillReport", "fill", "fingerprint", "load_picture", "meta_for"]
