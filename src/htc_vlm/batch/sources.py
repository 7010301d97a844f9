"""Lists the pictures of a folder, a list, parquet files or WebDataset tars; each is read when it is its turn.

Source:  WebDataset's convention (github.com/webdataset/webdataset): a member's name up to its first dot is the sample's key.
Differs: an uncompressed tar is read at offsets, so that several workers and a run that goes on need not read it from its start.
"""

from __future__ import annotations

import functools
import glob
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htc_vlm.batch.journal import WRITTEN
from htc_vlm.files import PICTURES, printable, read_text
from htc_vlm.store.pictures import paths_of

IMAGE_COLUMNS = ("image", "picture", "jpg", "png", "bytes", "content", "image_bytes")
PATH_COLUMNS = ("path", "file", "file_name", "image_path")


@dataclass(frozen=True)
class Ref:
    """Where one picture is. name: unique in its source, what its answers carry.

    at: byte offset in a tar, row in a parquet file's group. size: bytes in a tar, row group in a parquet file.
    """

    name: str
    kind: str  # "file", "tar" or "parquet"
    path: str
    at: int = 0
    size: int = 0

    @property
    def stamp(self) -> str:
        """What tells that its file was changed: size and times; "" of one that is not there."""
        try:
            found = os.stat(self.path)
        except OSError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    def read(self) -> bytes:
        """The picture's bytes. OSError or ValueError where it cannot be read."""
        if self.kind == "file":
            path = Path(self.path)
            if not path.is_file():
                raise OSError(f"{path}: {'is no regular file' if path.exists() else 'no such file; check the path'}")
            return path.read_bytes()
        if self.kind == "tar":
            with open(self.path, "rb") as file:
                file.seek(self.at)
                return file.read(self.size)
        value = _row_group(self.path, self.size)[self.at]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            content = value["path"]
        if isinstance(content, str):
            beside = Path(self.path).parent / content
            return (beside if beside.is_file() else Path(content)).read_bytes()
        if not isinstance(content, bytes):
            raise ValueError(f"{self.name}: has no bytes of a picture ({type(content).__name__})")
        return content


def refs_of(source: str) -> list[Ref]:
    """The pictures of a source, in its order. ValueError where there are none, or a name twice.

    A folder: its pictures, and those of its .tar and .parquet files; .tar, .parquet, or a pattern of them; .txt or .list: a
    path a line, relative to the list; a picture. Answers of a batch run are no source; tables without pictures in a folder
    are left out, and named on stderr.
    """
    path = Path(source)
    if not path.exists() and not glob.has_magic(source):
        raise FileNotFoundError(f"{source}: no such file or folder; check the path")
    refs = list(_refs_in(path)) if path.is_dir() else [ref for one in paths_of(source) for ref in _refs_of_file(one)]
    if not refs:
        raise ValueError(f"{source}: no pictures there (looked for {', '.join(sorted(PICTURES))}, .tar and .parquet)")
    seen: set[str] = set()
    for ref in refs:
        if ref.name in seen:
            raise ValueError(f"{source}: names {ref.name} twice; each picture needs a name of its own")
        seen.add(ref.name)
    return refs


def _refs_in(folder: Path) -> Iterator[Ref]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file():
            continue
        if file.suffix.lower() == ".parquet":
            schema = _open_parquet(file).schema_arrow
            if tuple(schema.names) == WRITTEN:
                continue  # answers of a run whose --output is in the folder
            try:
                _image_column(schema, file)
            except ValueError as error:
                print(f"htc-vlm batch: left out: {error}", file=sys.stderr)
                continue
        if file.suffix.lower() in (*PICTURES, ".tar", ".parquet"):
            yield from _refs_of_file(file)


def _refs_of_file(path: Path) -> Iterator[Ref]:
    kind = path.suffix.lower()
    if kind == ".tar":
        yield from _refs_in_tar(path)
    elif kind == ".parquet":
        yield from _refs_in_parquet(path)
    elif kind in (".txt", ".list") and path.is_file():
        for line in read_text(path).split("\n"):
            if line.strip():
                yield _file_ref(path.parent / line.strip())
    else:
        yield _file_ref(path)


def _file_ref(path: Path) -> Ref:
    return Ref(printable(str(path)), "file", str(path))


def _refs_in_tar(path: Path) -> Iterator[Ref]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix.lower() in PICTURES:
                    yield Ref(printable(f"{path}/{member.name}"), "tar", str(path), member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: is no uncompressed tar, or damaged ({error}); unpack it, or tar it without compression"
        ) from error


def _open_parquet(path: Path) -> Any:
    parquet = _parquet()
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own kinds
        raise ValueError(f"{path}: is no parquet file, or damaged ({error})") from error


def _refs_in_parquet(path: Path) -> Iterator[Ref]:
    file = _open_parquet(path)
    if tuple(file.schema_arrow.names) == WRITTEN:
        raise ValueError(f"{path}: holds answers of htc-vlm batch, no pictures; give what they are about")
    column = _image_column(file.schema_arrow, path)
    for group in range(file.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        names = [None] * n_rows
        for name_column in ("id", "key", *PATH_COLUMNS):
            if name_column in file.schema_arrow.names and name_column != column:
                names = file.read_row_group(group, columns=[name_column]).column(0).to_pylist()
                break
        for row in range(n_rows):
            name = f"{path}/{names[row]}" if names[row] is not None else f"{path}/{group}/{row}"
            yield Ref(printable(name), "parquet", str(path), row, group)


def _image_column(schema: Any, path: Path) -> str:
    for name in (*IMAGE_COLUMNS, *PATH_COLUMNS):
        if name in schema.names:
            return str(name)
    wanted = ", ".join((*IMAGE_COLUMNS, *PATH_COLUMNS))
    raise ValueError(f"{path}: has no column of pictures; columns are {', '.join(schema.names)}, looked for {wanted}")


@functools.lru_cache(maxsize=2)  # rows of one group are read one after the other
def _row_group(path: str, group: int) -> Sequence[Any]:
    file = _parquet().ParquetFile(path)
    column = _image_column(file.schema_arrow, Path(path))
    values: Sequence[Any] = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    return values


def _parquet() -> Any:
    from htc_vlm.store.export import pyarrow

    return pyarrow().parquet
