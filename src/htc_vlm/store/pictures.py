"""Finds pictures wherever they are: files, folders, patterns, bytes, PIL images; and makes them what a model gets.

Source:  ours.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from htc_vlm.data.images import DEFAULT_MAX_PIXELS, ImageError, from_bytes, from_image
from htc_vlm.files import PICTURES, picture_files

Picture = str | os.PathLike[str] | bytes | Image.Image


@dataclass(frozen=True)
class Found:
    """A picture that was given. name: of its file, None for bytes and PIL images. One of content, image, error is set."""

    name: str | None
    content: bytes | None = None
    image: Image.Image | None = None
    error: str = ""

    @property
    def id(self) -> bytes:
        """SHA-256 of the picture's bytes; of a PIL image, which has no file, of the size and pixels that are compressed.
        ImageError for a PIL image that cannot be."""
        if self.content is not None:
            return hashlib.sha256(self.content).digest()
        pixels = self.decoded()
        return hashlib.sha256(f"pixels {pixels.size} ".encode() + pixels.tobytes()).digest()

    def decoded(self, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
        """RGB, upright. ImageError for what is no picture, or would fill the memory when padded to a square."""
        name = self.name or "picture"
        if self.image is not None:
            picture = from_image(self.image, name, max_pixels)
        else:
            picture = from_bytes(self.content or b"", name, max_pixels)
        if max(picture.size) ** 2 > max_pixels:
            raise ImageError(
                f"{name}: {picture.width} x {picture.height} pixels, padded to a square, exceed {max_pixels:,}; crop it"
            )
        return picture


def find(pictures: Picture | Iterable[Picture]) -> Iterator[Found]:
    """Every picture once it is needed, read whole; what cannot be read comes with its error.

    A folder stands for the picture files in it and below, by their endings, sorted, without hidden ones (`.thumbnails/`,
    `._IMG_1.jpg`); a pattern (`*`, `?`, `[`) for the files that match. A file that is named is taken whatever its ending.
    ValueError for one folder or pattern without pictures; among others, it comes as an error.
    """
    if isinstance(pictures, str | os.PathLike):
        yield from map(_read, paths_of(pictures))
        return
    for picture in [pictures] if isinstance(pictures, bytes | Image.Image) else pictures:
        if isinstance(picture, bytes):
            yield Found(None, content=picture)
        elif isinstance(picture, Image.Image):
            yield Found(None, image=picture)
        elif isinstance(picture, str | os.PathLike):
            try:
                paths = paths_of(picture)
            except ValueError as error:
                yield Found(str(picture), error=str(error))
            else:
                yield from map(_read, paths)
        else:
            raise ValueError(f"a picture is a path, bytes or a PIL image, got {type(picture).__name__}")


def in_batches(given: Iterator[tuple[int, Found]], size: int) -> Iterator[list[tuple[int, Found]]]:
    """Lists of `size`, the last one shorter."""
    batch: list[tuple[int, Found]] = []
    for one in given:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def paths_of(given: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, a folder or a pattern stands for; a path of nothing as it is. ValueError for an empty folder.

    >>> paths_of("nowhere/at_all.png")
    [PosixPath('nowhere/at_all.png')]
    """
    path = Path(given)
    if os.path.isdir(path):  # unlike Path's own, these say no of a name that is too long, and of a folder that is closed
        found = [file for file in picture_files([path])[0] if os.path.isfile(file)]
        if not found:
            raise ValueError(f"{path}: no pictures in this folder (looked for {', '.join(sorted(PICTURES))})")
        return found
    if not os.path.exists(path) and glob.has_magic(str(given)):
        matches = [Path(one) for one in sorted(glob.glob(str(given), recursive=True)) if os.path.isfile(one)]
        if not matches:
            raise ValueError(f"{given}: no file matches this pattern")
        return matches
    return [path]


def _read(path: Path) -> Found:
    name = str(path)
    try:
        if not path.exists():
            return Found(name, error=f"{path}: no such file; check the path")
        if not path.is_file():
            return Found(name, error=f"{path}: is not a regular file; save the picture to disk first")
        return Found(name, content=path.read_bytes())
    except OSError as error:
        return Found(name, error=f"{path}: cannot be read ({error.strerror or error}); check its name and permissions")
