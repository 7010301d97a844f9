"""The pictures of a server: from a request's URL to what the model kept of it, compressing each new picture once.

An id is the SHA-256 of a picture's bytes, computed here and never taken from a client. Nothing is fetched from anywhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from htc_vlm.data.images import ImageError, from_bytes
from htc_vlm.files import printable
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.serve.engine import Engine
from htc_vlm.serve.errors import Refusal
from htc_vlm.store import DamagedImageError, ImageStore, UnknownImageError

DATA = re.compile(r"data:(?:image/[\w.+-]+|application/octet-stream)?(?:;[\w=.+-]+)*;base64,", re.I)
ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Found:
    """A picture's id and what is kept of it."""

    id: str
    images: CompressedImages


class Pictures:
    """Pictures of the store, and of questions that brought their own; the latter are not written to the store.

    The model's thread compresses, a thread of the store reads and writes, two more decode.
    """

    def __init__(self, engine: Engine, store: ImageStore) -> None:
        self.engine, self.store = engine, store
        self._memory = Memory(engine.limits.memory)
        self._compressing: dict[str, asyncio.Task[CompressedImages]] = {}
        self._disk = ThreadPoolExecutor(1, "htc-vlm-store")
        self._decoders = ThreadPoolExecutor(2, "htc-vlm-decode")
        self._decoded = asyncio.Semaphore(engine.limits.max_encode)  # pictures in memory as pixels

    async def stop(self) -> None:
        """Closes the store. After the engine has stopped."""
        await self._in(self._disk, self.store.close)
        self._disk.shutdown()
        self._decoders.shutdown()

    async def _in(self, thread: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, call, *args)
        except OSError as error:  # the disk is full, read-only, gone, or another process has been writing for too long
            raise Refusal(507, f"the store: {error}", "store_unavailable") from error

    # ---------------------------------------------------------------- for questions
    async def by_url(self, url: str) -> Found:
        """`htc:ID`, or a `data:` URI whose picture is compressed if it was not before. Refusal 400, 404 or 413."""
        if url.startswith("htc:"):
            self.engine.metrics.reused.inc()
            return await self.stored(url[4:])
        data = await self._in(self._decoders, data_of, url)
        key = await self._in(self._decoders, image_id, data)
        kept = self._memory.get(key) or await self._stored_or_none(key)
        if kept is not None:
            self.engine.metrics.reused.inc()
            return Found(key, kept)
        task = self._compressing.get(key)
        if task is None:  # others that bring the same picture meanwhile wait for this one
            task = asyncio.create_task(self._compress(key, data))
            self._compressing[key] = task
            task.add_done_callback(lambda _: self._compressing.pop(key, None))
        return Found(key, await asyncio.shield(task))

    async def _compress(self, key: str, data: bytes) -> CompressedImages:
        images = await self._compressed(data)
        self._memory.put(key, images)
        return images

    async def _compressed(self, data: bytes) -> CompressedImages:
        async with self._decoded:
            picture = await self._in(self._decoders, decoded, data, self.engine.limits.max_pixels)
            images = await self.engine.together(self._encode, picture)
        self.engine.metrics.encoded.inc()
        return images

    def _encode(self, pictures: list[Image.Image]) -> list[CompressedImages]:
        """In the model's thread: as the store packs them."""
        return self.store.compress_each(pictures)

    # ---------------------------------------------------------------- the store
    async def stored(self, key: str) -> Found:
        """By id or name. Refusal 404 for what is not there; 500 for a damaged entry, from which nothing is answered."""
        try:
            if not ID.fullmatch(key):
                key = (await self._in(self._disk, self.store.find, key)).hex()
            return Found(key, await self._in(self._disk, self.store.get, [key]))
        except UnknownImageError as error:
            raise Refusal(404, f"no image {key!r} in the store; add it with POST /v1/images", "image_not_found") from error
        except DamagedImageError as error:
            raise Refusal(500, f"image {key} is damaged; add its picture again", "image_damaged") from error

    async def _stored_or_none(self, key: str) -> CompressedImages | None:
        """A damaged entry is none: its picture is at hand."""
        try:
            return (await self.stored(key)).images
        except Refusal:
            return None

    async def add(self, data: bytes, name: str | None) -> str:
        """Compresses a picture if the store has it not, and keeps it; one that is there keeps its place in the list. Its id.
        Refusal 400 for what is no picture, and for a name that would be taken for an id."""
        if name is not None and ID.fullmatch(name):
            raise Refusal(400, f"name: {name} is taken for an id; give another", "invalid_request")
        key = await self._in(self._decoders, image_id, data)
        if await self._stored_or_none(key) is None:
            await self._in(self._disk, self.store.put, [key], await self._compressed(data), [name])
        elif name is not None:
            await self._in(self._disk, self.store.name, [(name, key)])
        self._memory.drop(key)
        return key

    async def remove(self, key: str) -> str:
        """By id or name; its id. Refusal 404 for what is not there."""
        try:
            id = key if ID.fullmatch(key) else (await self._in(self._disk, self.store.find, key)).hex()
            found = await self._in(self._disk, self.store.remove, [id])
        except UnknownImageError:
            found = 0
        except DamagedImageError as error:
            raise Refusal(500, f"image {key}: {error}", "image_damaged") from error
        if not found:
            raise Refusal(404, f"no image {key!r} in the store", "image_not_found")
        self._memory.drop(id)
        return id

    async def list(self, limit: int, after: str | None) -> list[dict[str, Any]]:
        """What the store has, oldest first, behind the id `after`. Refusal 400 for one that is not there."""
        try:
            entries = await self._in(self._disk, lambda: self.store.list(limit=limit, after=after))
        except ValueError as error:
            raise Refusal(400, f"after: {error}", "invalid_request") from error
        return [
            {"id": str(one), "object": "image", "names": [printable(name) for name in one.names], "bytes": one.nbytes,
             "created": int(one.added)}
            for one in entries
        ]  # fmt: skip

    async def count(self) -> int:
        return await self._in(self._disk, len, self.store)

    async def describe(self, key: str) -> dict[str, Any]:
        """One image of the store. map: where the bottleneck looked, a number of 0 to 255 a patch, row by row; or None."""
        images = (found := await self.stored(key)).images
        seen = None
        if images.maps is not None:
            side = math.isqrt(images.maps.shape[1])
            seen = {"rows": side, "columns": side, "values": images.maps[0].tolist()}
        return {"id": found.id, "object": "image", "bytes": images.nbytes, "tokens": images.n_bottleneck, "map": seen}


class Memory:
    """Compressed images up to a number of bytes; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._n_bytes = limit, 0
        self._kept: OrderedDict[str, CompressedImages] = OrderedDict()

    def get(self, key: str) -> CompressedImages | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: str, images: CompressedImages) -> None:
        self.drop(key)
        self._kept[key] = images
        self._n_bytes += images.nbytes
        while self._n_bytes > self._limit:
            self._n_bytes -= self._kept.popitem(last=False)[1].nbytes

    def drop(self, key: str) -> None:
        if key in self._kept:
            self._n_bytes -= self._kept.pop(key).nbytes


def image_id(data: bytes) -> str:
    """64 hex digits.

    >>> image_id(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()


def data_of(url: str) -> bytes:
    """The bytes in a `data:` URI. Refusal 400 for any other URL: nothing is fetched.

    >>> data_of("data:image/png;base64,aGk=")
    b'hi'
    """
    head = DATA.match(url[:200])
    if head is None:
        what = "image_url must be data:image/...;base64,... or htc:ID; this server fetches nothing"
        raise Refusal(400, what, "invalid_image")
    try:
        return base64.b64decode("".join(url[head.end() :].split()), validate=True)  # `base64 FILE` breaks lines
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"image_url is not base64 ({error})", "invalid_image") from error


def decoded(data: bytes, max_pixels: int) -> Image.Image:
    """Bytes -> RGB. Refusal 400 with what is wrong with the picture; its padded square counts, too."""
    try:
        picture = from_bytes(data, max_pixels=max_pixels)
    except ImageError as error:
        raise Refusal(400, str(error), "invalid_image") from error
    if max(picture.size) ** 2 > max_pixels:
        what = f"a picture of {picture.width} x {picture.height} pixels, padded to a square, exceeds {max_pixels:,}; crop it"
        raise Refusal(400, what, "invalid_image")
    return picture
