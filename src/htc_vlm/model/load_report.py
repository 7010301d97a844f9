"""Loading without transformers' table of MISSING weights, where our own check says what is missing, in one line.

Source:  transformers 5.23, utils/loading_report.py: the table is one warning of transformers.modeling_utils.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


@contextmanager
def without_load_report() -> Iterator[None]:
    """The table is not printed inside the block; other messages are."""
    logger = logging.getLogger("transformers.modeling_utils")

    def passes(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def holds_weights(path: str | os.PathLike[str], prefix: str) -> bool:
    """Does a checkpoint folder hold weights whose names begin with `prefix`? True where that cannot be seen without loading."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return True
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                if any(name.startswith(prefix) for name in opened.keys()):  # noqa: SIM118 (it is no dict)
                    return True
        except SafetensorError:
            return True  # damaged: loading says so
    return False
