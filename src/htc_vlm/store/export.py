"""Writes a store's images to parquet, for pandas, DuckDB, Spark or Hugging Face datasets.

Source:  ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from htc_vlm.files import printable, replacing
from htc_vlm.store.about import About
from htc_vlm.store.rows import Row


def pyarrow() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet needs pyarrow; install it with pip install 'htc-vlm[batch]'") from error
    return pyarrow


def write_parquet(path: Path, about: About, batches: Iterator[list[tuple[Row, list[str]]]]) -> None:
    """One row an image, in row groups of one batch; whole or not at all."""
    arrow = pyarrow()
    sizes = {"layers": about.layers, "n_heads": about.n_heads, "head_dim": about.head_dim}
    dtype = str(about.torch_dtype).removeprefix("torch.") if about.dtype == "model" else about.dtype
    said = {"recipe": about.recipe.digest, "parts": about.recipe.parts, "dtype": dtype, **sizes}
    fields = [
        ("id", arrow.string()), ("names", arrow.list_(arrow.string())), ("kv", arrow.binary()), ("map", arrow.binary()),
        ("n_visual", arrow.int32()), ("n_entries", arrow.int32()), ("added", arrow.float64()),
    ]  # fmt: skip
    schema = arrow.schema(fields, metadata={"htc_vlm": json.dumps(said)})
    with replacing(path) as partial, arrow.parquet.ParquetWriter(partial, schema) as writer:
        for batch in batches:
            rows = [
                {"id": row.id.hex(), "names": [printable(one) for one in names], "kv": row.kv, "map": row.seen or None,
                 "n_visual": row.n_visual, "n_entries": row.n_entries, "added": row.added}
                for row, names in batch
            ]  # fmt: skip
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
