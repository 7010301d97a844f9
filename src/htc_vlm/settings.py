"""Read settings from the command line and from YAML."""

from __future__ import annotations


def budget(text: str) -> float:
    """`64` -> 64 tokens, `0.11` -> a share of the patches; the type of `--budget`.

    >>> budget("64"), budget("0.11")
    (64, 0.11)
    """
    return int(text) if text.strip().isdigit() else float(text)
