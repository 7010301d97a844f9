"""results/<table>/<row>/<seed>.json -> Markdown and CSV. Tables are rebuilt from files, never typed.

Source:  the result files of huggingface/peft method_comparison.
Differs: every cell shows its spread over seeds and how many seeds there are.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htc_vlm.eval.retention import row_between, row_mean

BOUND_ROWS = ("lower-bound", "upper-bound")


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


@dataclass(frozen=True)
class Row:
    """One experiment: its cells by task, the files they come from, mean training seconds (None where unknown)."""

    name: str
    cells: dict[str, Cell]
    files: tuple[Path, ...]
    seconds: float | None


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{row name: its result files' contents, by seed} of one table; ValueError when there is none or one is broken."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content.get("metrics"), dict):
            raise ValueError(f"{path} has no 'metrics': not a result file")
        results.setdefault(path.parent.name, []).append(content | {"file": path})
    if not results:
        raise ValueError(f"no results in {folder}: expected {folder}/<row>/<seed>.json")
    return results


def make_rows(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """One Row per experiment, in the order given. Seeds that measured different tasks are an error."""
    rows = []
    for name, seeds in results.items():
        tasks = [list(seed["metrics"]) for seed in seeds]
        if any(set(measured) != set(tasks[0]) for measured in tasks):
            raise ValueError(f"row {name}: its seeds measured different tasks: {tasks}")
        cells = {task: Cell.of([float(seed["metrics"][task]) for seed in seeds]) for task in tasks[0]}
        seconds = [float(seed["seconds"]) for seed in seeds if seed.get("seconds") is not None]
        mean_seconds = statistics.fmean(seconds) if seconds else None
        rows.append(Row(name, cells, tuple(seed["file"] for seed in seeds), mean_seconds))
    return rows


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Every task that some row measured, in order of first appearance.

    >>> one = Cell.of([1])
    >>> columns_of([Row("a", {"x": one}, (), None), Row("b", {"y": one, "x": one}, (), None)])
    ['x', 'y']
    """
    return list(dict.fromkeys(task for row in rows for task in row.cells))


def with_retention(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """{row: its mean retention three ways} when the table has both bounds, for rows that measured every task."""
    by_name = {row.name: row for row in rows}
    if not all(bound in by_name for bound in BOUND_ROWS):
        return {}
    lower, upper = ({task: cell.mean for task, cell in by_name[bound].cells.items()} for bound in BOUND_ROWS)
    separating = [task for task in columns_of(rows) if task in lower and task in upper and lower[task] < upper[task]]
    retention = {}
    for row in rows:
        if len(separating) < 2 or not set(separating) <= set(row.cells):
            continue
        mean = row_mean(row_between({task: row.cells[task].mean for task in separating}, lower, upper))
        retention[row.name] = {
            "retention": f"{mean.printed:.1f}",
            "capped at 100": f"{mean.capped:.1f}",
            "without the most generous": f"{mean.without_most_generous:.1f} ({mean.most_generous})",
        }
    return retention


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, header first: row, tasks, retention (where there are bounds), seeds, seconds."""
    tasks, retention = columns_of(rows), with_retention(rows)
    extra = list(next(iter(retention.values()))) if retention else []
    lines = [["row", *tasks, *extra, "seeds", "seconds"]]
    for row in rows:
        cells = [str(row.cells[task]) if task in row.cells else "" for task in tasks]
        kept = [retention.get(row.name, {}).get(name, "") for name in extra]
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append([row.name, *cells, *kept, str(len(row.files)), seconds])
    return lines


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


def render(folder: Path, order: Sequence[str] = ()) -> list[list[str]]:
    """The grid of one results folder; rows named in `order` first, in that order, the rest by name after them."""
    results = read_results(folder)
    names = [name for name in order if name in results] + [name for name in results if name not in order]
    return grid(make_rows({name: results[name] for name in names}))
