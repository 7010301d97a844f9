"""`ImageStore`: each picture compressed once, kept under the SHA-256 of its bytes, asked about by any process later.

Source:  VoCo-LLaMA section 3.4 (re-use of the cached token); vLLM 55547 and hermes-agent 62585 for why the key is the picture's
         bytes and everything that made the entry, never a name that a caller chose.
Differs: ours. `store.json` says what made the images and how they are packed; `shards.py` keeps the rows.
"""

from __future__ import annotations

import builtins
import errno
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.applied.hf_compat import unwrapped
from htc_vlm.data.images import ImageError
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.packing import DTYPES, LEAST_CALIBRATION, Levels, Packed, Shape, row_bytes
from htc_vlm.store.about import About
from htc_vlm.store.encoding import OwnBottleneck, StockMethod, encode_each, encoder_of, heads_of, method_in
from htc_vlm.store.entries import Added, StoredImage
from htc_vlm.store.listing import listed
from htc_vlm.store.pictures import Found, Picture, find, in_batches
from htc_vlm.store.rows import Row, UnknownImageError, check_names, is_id, key_of
from htc_vlm.store.shards import Shards

Encoder = OwnBottleneck | StockMethod
BATCH = 32
CALIBRATE_ON = 512  # pictures of the first `add` of an int2 store


class ImageStore:
    """A folder of compressed images. Open it with `ImageStore.open`; use it in a `with` block, or `close` it.

    Many processes may read and write one store at once. What `add` returned is on disk, whatever happens next.
    """

    def __init__(self, path: Path, about: About, encoder: Encoder | None, read_only: bool, maps: bool) -> None:
        self.path, self.about, self.read_only, self.maps = path, about, read_only, maps
        self._encoder = encoder
        self._shards = Shards(path, about.recipe.digest.encode(), read_only)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Any = None,
        processor: Any = None,
        dtype: str = "model",
        *,
        method: str | Mapping[str, Any] | None = None,
        maps: bool = False,
        levels: Levels | None = None,
        read_only: bool = False,
    ) -> ImageStore:
        """Open the store in a folder, or make one there.

        model, processor: what compresses; without them what is stored can be read, but not added to.
        method: of a model without a bottleneck, a question-independent one and its settings ({"name": "divprune", "n_keep":
        64}); its images are asked with `htc_vlm.generate`. Without, that of the store.
        dtype: "model", "int8", "int4" or "int2", how a new store packs images; "model" takes a store that is there as it is.
        levels: of int2; without, they are calibrated on the first pictures added (64 or more). maps: keep where the
        bottleneck looked, too. A store on a read-only disk is opened for reading.
        ValueError: made with another recipe or dtype, of a newer schema, damaged, or no store and no model to make one.
        """
        folder, model = Path(path), unwrapped(model)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
        if (model is None) != (processor is None):
            raise ValueError("give the model and its processor, or neither")
        about = About.read(folder)
        stored = None if about is None else method_in(about.recipe)
        encoder = None if model is None else encoder_of(model, processor, method, stored)
        if maps and (isinstance(encoder, StockMethod) or not getattr(model, "HAS_MAPS", True)):
            told = "maps are of what a bottleneck looked at in a square grid of patches"
            raise ValueError(f"{told}, which this model does not have; leave maps out")
        if about is None and (encoder is None or read_only):
            raise ValueError(f"{folder}: no store is there; give a model and its processor to make one")
        if encoder is None and (method is not None or maps):
            raise ValueError(f"{folder}: method and maps are for adding; give a model and its processor, or leave them out")
        if about is None:
            assert encoder is not None
            about = About.make(folder, encoder.recipe(), dtype, model.dtype, heads_of(model), levels)
        if encoder is not None:
            about.check_recipe(encoder.recipe(), folder)
        if levels is not None:
            about = about.with_levels(folder, levels)
        if dtype not in ("model", about.dtype):
            raise ValueError(f"{folder}: this store keeps {about.dtype}, not {dtype}; make a new one, or leave dtype out")
        return cls(folder, about, encoder, read_only or not os.access(folder, os.W_OK), maps)

    # -------------------------------------------------------------------------------------------------------------- add
    def add(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        batch_size: int = BATCH,
        progress: bool = False,
        on_refused: Callable[[str, str], None] | None = None,
    ) -> Added:
        """Compress what is not there yet (with `maps`, also what has none) -> the ids of all pictures, in order; equal bytes
        have one.

        pictures: files, folders, patterns, bytes, PIL images, or a mixture; names of files are kept.
        on_refused(name, reason): called for each picture that cannot be read; without it a warning says how many. They are
        in `.refused` of what is returned, and hold nothing up. Every `batch_size` pictures are committed.
        OSError: the disk is full or read-only; what was added before stays.
        """
        if self._encoder is None:
            raise ValueError(f"{self.path}: opened without a model, so nothing can be added; open it with one")
        self._need_writable()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        self.about.check_recipe(self._encoder.recipe(), self.path)
        out = Added()

        def refuse(found: Found, number: int, reason: str) -> None:
            out.refused.append((found.name or f"picture {number}", " ".join(reason.split())))
            if on_refused is not None:
                on_refused(*out.refused[-1])

        given: Iterator[tuple[int, Found]] = enumerate(find(pictures))
        if self.about.dtype == "int2" and self.about.levels is None:
            given = self._calibrate(given)
        with tqdm(disable=not progress, unit=" pictures", smoothing=0.05) as bar:
            for batch in in_batches(given, batch_size):
                self._add_batch(batch, out, refuse)
                bar.update(len(batch))
                bar.set_postfix(new=out.n_new, refused=len(out.refused))
        if out.refused and on_refused is None:
            warnings.warn(f"{len(out.refused)} pictures left out, e.g. {out.refused[0][1]}; see .refused", stacklevel=2)
        return out

    def _add_batch(self, batch: list[tuple[int, Found]], out: Added, refuse: Callable[[Found, int, str], None]) -> None:
        """Compress those pictures that are not there, and commit all with their names."""
        readable: list[tuple[int, Found]] = []
        ids: dict[int, bytes] = {}
        for number, found in batch:
            try:
                if found.error:
                    raise ImageError(found.error)
                ids[number] = found.id
                check_names([] if found.name is None else [(found.name, ids[number])])
                readable.append((number, found))
            except (ImageError, OSError, ValueError) as error:
                refuse(found, number, str(error))
        there = self._shards.intact(list(ids.values()), with_map=self.maps)
        new: dict[bytes, Any] = {}
        broken: set[bytes] = set()
        for number, found in readable:
            id = ids[number]
            if id not in there and id not in new and id not in broken:
                try:
                    new[id] = found.decoded()
                except (ImageError, OSError, ValueError) as error:
                    broken.add(id)
                    refuse(found, number, str(error))
            elif id in broken:
                refuse(found, number, f"{found.name or 'picture'}: the same bytes as a picture that cannot be read")
        rows, unfit = self._encoded(new)
        for number, found in readable:
            if ids[number] in unfit:
                refuse(found, number, f"{found.name or 'picture'}: {unfit[ids[number]]}")
        kept = [(ids[number], found) for number, found in readable if ids[number] not in broken and ids[number] not in unfit]
        self._shards.write(rows, [(found.name, id) for id, found in kept if found.name is not None])
        out.n_new += len(rows)
        out.extend(id.hex() for id, _ in kept)

    def _encoded(self, new: Mapping[bytes, Any]) -> tuple[builtins.list[Row], dict[bytes, str]]:
        """Id -> picture as rows, and why others cannot be kept."""
        rows: builtins.list[Row] = []
        unfit: dict[bytes, str] = {}
        ids = list(new)
        assert self._encoder is not None
        pictures = list(new.values())
        for numbers, part in encode_each(self._encoder, pictures, self.maps, lambda i, why: unfit.update({ids[i]: why})):
            part.check_made_by(self.about.recipe.digest)
            rows += self._rows([ids[i] for i in numbers], self._as_stored(part))
        return rows, unfit

    def compress(self, pictures: Sequence[Any]) -> CompressedImages:
        """Decoded pictures -> as this store packs them, without keeping them."""
        return CompressedImages.concat(self._compress(pictures))

    def compress_each(self, pictures: Sequence[Any]) -> builtins.list[CompressedImages]:
        """The same, one by one: pictures of a stock model may have other counts of entries."""
        return [one for part in self._compress(pictures) for one in part]

    def _compress(self, pictures: Sequence[Any]) -> builtins.list[CompressedImages]:
        """The same in as many parts as there are counts of entries."""
        if self._encoder is None:
            raise ValueError(f"{self.path}: opened without a model; open it with one")
        parts = self._encoder.encode(pictures, self.maps)
        for part in parts:
            part.check_made_by(self.about.recipe.digest)
        return [self._as_stored(part) for part in parts]

    def put(self, ids: Sequence[str], images: CompressedImages, names: Sequence[str | None] | None = None) -> None:
        """Keep images that were compressed elsewhere, e.g. in another process: ids are SHA-256 of their pictures' bytes.

        ValueError for images of another recipe. Rows of one shard are committed in groups of 32.
        """
        self._need_writable()
        images.check_made_by(self.about.recipe.digest)
        keys = [key_of(one) for one in ids]
        named = [(name, id) for name, id in zip(names or [None] * len(keys), keys, strict=True) if name is not None]
        check_names(named)
        self._shards.write(self._rows(keys, self._as_stored(images)), named)

    def name(self, names: Iterable[tuple[str, str]]) -> None:
        """Give names to images: (name, id). A name that another image has goes to the new one."""
        self._need_writable()
        named = [(name, key_of(id)) for name, id in names]
        check_names(named)
        self._shards.write([], named)

    def intact(self, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that are there and undamaged."""
        return {id.hex() for id in self._shards.intact([key_of(one) for one in ids])}

    def _as_stored(self, images: CompressedImages) -> CompressedImages:
        about = self.about
        layers, _, n_heads, _, head_dim = images.shape
        if (layers, n_heads, head_dim) != (about.layers, about.n_heads, about.head_dim):
            raise ValueError(f"{self.path}: keeps {about.layers} layers of {about.n_heads} x {about.head_dim}, got {images!r}")
        if about.dtype == "model":
            return images.as_dtype("model").to(about.torch_dtype)
        if about.dtype == "int2" and about.levels is None:
            raise ValueError(f"{self.path}: int2 has no levels yet; add {LEAST_CALIBRATION} pictures at once, or give levels")
        return images.as_dtype(about.dtype, about.levels)

    def _rows(self, ids: Sequence[bytes], images: CompressedImages) -> list[Row]:
        entries = zip(ids, images.n_visual, images.row_bytes(), images.map_bytes(), strict=True)
        return [Row(id, n_visual, images.n_bottleneck, kv, seen) for id, n_visual, kv, seen in entries]

    def _calibrate(self, given: Iterator[tuple[int, Found]]) -> Iterator[tuple[int, Found]]:
        """Fit int2's levels on the first pictures; all pictures, from the first on."""
        first = [one for one, _ in zip(given, range(CALIBRATE_ON), strict=False)]
        assert self._encoder is not None
        kv = []
        for batch in in_batches(iter(first), BATCH):
            pictures = []
            for _, found in batch:
                if not found.error:
                    try:
                        pictures.append(found.decoded())
                    except (ImageError, OSError, ValueError):
                        continue  # told when it is its turn
            kv += [part.kv.float().cpu() for _, part in encode_each(self._encoder, pictures, False, lambda i, why: None)]
        if len({one.shape[1:] for one in kv}) > 1:
            raise ValueError(f"{self.path}: int2 has levels for images of one size, and these have several; use int4 or int8")
        if not kv:
            raise ValueError(f"{self.path}: int2 needs pictures to calibrate its levels on, and none could be read")
        self.about = self.about.calibrated(self.path, Levels.fit(torch.cat(kv)))
        yield from first
        yield from given

    # -------------------------------------------------------------------------------------------------------------- get
    def get(self, ids: Sequence[str] | str) -> CompressedImages:
        """Images by id or name, in the order asked for, each checked against its checksum.

        UnknownImageError, DamagedImageError (both ValueErrors) name the first that cannot be given.
        """
        wanted = [self.find(one) for one in ([ids] if isinstance(ids, str) else ids)]
        if not wanted:
            raise ValueError("no ids were given; `list` shows what there is")
        found = self._shards.read(wanted)
        return self._images([found[id] for id in wanted])

    def find(self, id_or_name: str) -> bytes:
        """The 32 bytes of an id of 64 hex digits, or of the image of that name. UnknownImageError for a name nobody gave."""
        return key_of(id_or_name) if is_id(id_or_name) else self._shards.find(id_or_name)

    def _images(self, rows: Sequence[Row]) -> CompressedImages:
        """Rows -> images in one tensor."""
        about, counts = self.about, {row.n_entries for row in rows}
        if len(counts) > 1:
            raise ValueError(f"images of {sorted(counts)} entries do not fit one tensor; get those of one size at a time")
        shape: Shape = (about.layers, 2, about.n_heads, counts.pop(), about.head_dim)
        raw = torch.frombuffer(bytearray(b"".join(row.kv for row in rows)), dtype=torch.uint8)
        if about.dtype == "model":
            kv: torch.Tensor | Packed = raw.view(about.torch_dtype).reshape(len(rows), *shape)
        else:
            kv = Packed(about.dtype, raw.reshape(len(rows), row_bytes(shape, about.dtype)), shape, about.levels)
        sizes = {len(row.seen) for row in rows}
        maps = None
        if len(sizes) == 1 and 0 not in sizes:
            maps = torch.frombuffer(bytearray(b"".join(row.seen for row in rows)), dtype=torch.uint8).reshape(len(rows), -1)
        counts_visual = [row.n_visual for row in rows]
        return CompressedImages(kv, about.recipe.digest, counts_visual, maps, about.recipe.parts.get("prompt"))

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, id_or_name: object) -> bool:
        """Is there an intact image of this id or name?"""
        try:
            id = self.find(str(id_or_name))
        except UnknownImageError:
            return False
        return bool(self._shards.intact([id]))

    # ------------------------------------------------------------------------------------------------------------- keep
    def remove(self, ids: Sequence[str] | str) -> int:
        """Take images out by id or name, with all their names; how many there were. Unknown ones are passed over."""
        self._need_writable()
        known = []
        for one in [ids] if isinstance(ids, str) else ids:
            with suppress(UnknownImageError):
                known.append(self.find(one))
        return self._shards.remove(known)

    def verify(self, progress: bool = False) -> builtins.list[str]:
        """Read everything: the ids of damaged images. `add` their pictures again, or `remove` them.

        DamagedImageError for a file whose rows cannot even be listed; it says what to do.
        """
        damaged: builtins.list[str] = []
        with tqdm(total=len(self) if progress else None, disable=not progress, unit=" images") as bar:
            for n_rows, ids in self._shards.damaged():
                damaged += [id.hex() for id in ids]
                bar.update(n_rows)
        return list(dict.fromkeys(damaged))

    def compact(self) -> int:
        """Give the room of removed images back to the disk; how many bytes."""
        self._need_writable()
        before = self.nbytes_on_disk
        self._shards.compact()
        return before - self.nbytes_on_disk

    @property
    def method(self) -> Mapping[str, Any] | None:
        """The method on a stock model that made the images, {"name": ..., settings}; None for a model's own."""
        return method_in(self.about.recipe)

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of all the store's files."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    def merge(self, other: ImageStore | str | os.PathLike[str], progress: bool = False) -> int:
        """Take over all images and names of another store of the same recipe and packing; how many were new.

        Of two pictures of one name, that which it was given to last has it.
        Damaged images of the other stay where they are, with a warning. ValueError for another recipe or dtype.
        """
        self._need_writable()
        if not isinstance(other, ImageStore):
            with ImageStore.open(other, read_only=True) as opened:
                return self.merge(opened, progress)
        if other.path.resolve() == self.path.resolve():
            raise ValueError(f"{self.path}: is the same store; give another one")
        self.about.check_recipe(other.about.recipe, other.path)
        if self.about.dtype == "int2" and self.about.levels is None and other.about.levels is not None:
            self.about = self.about.calibrated(self.path, other.about.levels)
        if not self.about.same_packing(other.about):
            raise ValueError(
                f"{other.path}: its {other.about.dtype} is packed in another way than {self.path}'s {self.about.dtype}"
            )
        n_new, n_damaged = 0, 0
        ids = list(other._shards.ids())
        for start in tqdm(range(0, len(ids), 16 * BATCH), disable=not progress):
            chunk = ids[start : start + 16 * BATCH]
            here, whole = self._shards.intact(chunk), other._shards.intact(chunk)
            rows = other._shards.read([id for id in chunk if id in whole and id not in here])
            names = {name: (id, at) for id in chunk if id in whole for name, at in other._shards.names_given(id)}
            ours = self._shards.last_given(list(names))
            newer = {name: one for name, one in names.items() if name not in ours or one[1] > ours[name]}
            given = {name: at for name, (_, at) in newer.items()}
            self._shards.write(list(rows.values()), [(name, id) for name, (id, _) in newer.items()], given)
            n_new, n_damaged = n_new + len(rows), n_damaged + len(chunk) - len(whole)
        if n_damaged:
            warnings.warn(f"{other.path}: {n_damaged} damaged images were left out; `verify` names them", stacklevel=2)
        return n_new

    def export(self, path: str | os.PathLike[str], progress: bool = False) -> int:
        """Write all images to a parquet file (needs pyarrow): id, names, kv as packed, map, n_visual, n_entries; how many.

        The recipe, dtype and sizes are in the schema's metadata. A damaged image stops it, and no file is left.
        """
        from htc_vlm.store.export import write_parquet

        ids = list(self._shards.ids())
        write_parquet(Path(path), self.about, self._exported(ids, progress))
        return len(ids)

    def _exported(self, ids: Sequence[bytes], progress: bool) -> Iterator[builtins.list[tuple[Row, builtins.list[str]]]]:
        for start in tqdm(range(0, len(ids), 1024), disable=not progress):
            chunk = ids[start : start + 1024]
            rows, names = self._shards.read(chunk), self._shards.names(chunk)
            yield [(rows[id], names[id]) for id in chunk]

    def _need_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "is read-only; the store can be read", str(self.path))

    def list(self, limit: int | None = None, name: str | None = None, after: str | None = None) -> builtins.list[StoredImage]:
        """The ids of what is stored, oldest first, each a str with `.names`, `.nbytes` and `.added`.

        limit: at most so many. name: only those with a name that contains it. after: only those behind this id, to go on
        where another call ended; UnknownImageError where it is not there (any more).
        """
        return listed(self._shards, limit, name, None if after is None else key_of(after))

    def close(self) -> None:
        """Close this process's connections."""
        self._shards.close()

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
