"""Reads the parquet files of a data set on the Hugging Face hub: rows at once, pictures when they are asked for.

Source:  the layouts of lmms-lab's copies of the official benchmarks, CONFIG/SPLIT-00000-of-0000N.parquet or
         data/SPLIT-..., and of the hub's own conversion, CONFIG/SPLIT/0000.parquet.
Differs: read with pyarrow (the extra `parquet`), without the `datasets` library.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from htc_vlm.data.images import ImageError
from htc_vlm.eval.task import picture_from


def hub_files(folder: Path, split: str, configs: Sequence[str] = ()) -> list[Path]:
    """Parquet files of a split below `folder`, sorted; of the first of `configs` that is there, if one is.

    A file belongs to a split by its name (`test-00000-of-00002.parquet`, `test.parquet`) or its folder (`test/0000.parquet`).
    """
    files = [
        path for path in sorted(folder.rglob("*.parquet"))
        if path.name.startswith(f"{split}-") or path.stem == split or path.parent.name == split
    ]  # fmt: skip
    for config in configs:
        of_config = [path for path in files if config in path.relative_to(folder).parts]
        if of_config:
            return of_config
    return files


def reads_hub(official: Path, files: Sequence[Path]) -> bool:
    """Whether a task reads its parquet files: they are there, and the official file is not."""
    return bool(files) and not official.is_file()


def hub_rows(files: Sequence[Path], columns: Sequence[str], picture: str = "image") -> Iterator[tuple[dict[str, Any], Any]]:
    """(row of `columns`, loader of its picture or None) of all files, in order. ValueError names a missing column."""
    parquet = _pyarrow_parquet(files[0])
    for path in files:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        missing = [column for column in columns if column not in names]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(names)}")
        for group in range(file.num_row_groups):
            # `image.path` tells a row without a picture from one with, at the price of a name.
            rows = file.read_row_group(group, columns=[*columns, f"{picture}.path"]).to_pylist()
            for number, row in enumerate(rows):
                has_picture = picture in names and row.pop(picture, True) is not None
                yield row, HubPicture(path, group, number, picture) if has_picture else None


@dataclass(frozen=True)
class HubPicture:
    """Loads one picture of a parquet file as RGB when called; of several frames, the middle one."""

    path: Path
    group: int
    number: int
    column: str

    def __call__(self) -> Image.Image:
        name = f"{self.path}, row {self.number} of row group {self.group}"
        cell = _pictures(self.path, self.group, self.column)[self.number]
        if isinstance(cell, list):
            cell = cell[len(cell) // 2] if cell else None
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise ImageError(f"{name}: holds no picture bytes; download the file again")
        return picture_from(io.BytesIO(data), name)


@lru_cache(maxsize=2)
def _pictures(path: Path, group: int, column: str) -> list[Any]:
    """The pictures of one row group; questions come in the file's order, so one read serves many."""
    table = _pyarrow_parquet(path).ParquetFile(path).read_row_group(group, columns=[column])
    cells: list[Any] = table.column(column).to_pylist()
    return cells


def _pyarrow_parquet(path: Path) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading parquet files needs pyarrow; pip install 'htc-vlm[parquet]'") from None
    module: ModuleType = pyarrow.parquet
    return module
