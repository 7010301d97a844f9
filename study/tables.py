"""Writes the cells of a table as Markdown and CSV.

Source:  the result files of huggingface/peft method_comparison.
Differs: every cell shows its spread over seeds and how many seeds there are.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One number of a table: mean over seeds, standard deviation (None with one seed), number of seeds."""

    mean: float
    deviation: float | None
    n_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is the header.

    >>> print(to_markdown([["row", "gqa"], ["htc", "57.6"]]))
    | row | gqa |
    |---|---|
    | htc | 57.6 |
    """
    header, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([header, "|" + "---|" * len(lines[0]), *body])


def to_csv(lines: Sequence[Sequence[str]]) -> str:
    """The same table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
