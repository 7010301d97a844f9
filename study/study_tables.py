"""The tables of a study from its result files: scores beside blind baselines and ceiling, retention, cost, differences.

Source:  docs/design.md; retention as the paper's Tables 1 and 2 print it (eval/retention.py).
Differs: a row that was not run says so, one that a method refuses says why; nothing is left out. Retention leaves out
         columns that the bounds do not separate by 5 points: a share of nothing is noise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from htc_vlm.eval.compare import Difference, paired_bootstrap
from htc_vlm.eval.retention import RowMean, row_between, row_mean, row_of_upper
from study.answers import QuestionSet, read_questions, unpacked_bits
from study.definitions import Comparison, Table, columns_for, followed, read_experiment, read_tables
from study.tables import Cell

MIN_APART = 5.0  # points between the bounds, below which a column has no retention
N_RESAMPLES = 2000
NOT_RUN = "not run"
BLIND = ("question only", "majority", "bag of things")  # names in the baselines; the last is a ceiling


@dataclass(frozen=True)
class StudyRow:
    """One row of a table. source: "table/row" whose results it shows; results: by seed, with "file".

    first_token_ms: of 32 questions, measured apart (benchmarks/first_token.py).
    """

    name: str
    title: str
    note: str
    source: str
    results: tuple[dict[str, Any], ...]
    first_token_ms: float | None = None

    @property
    def impossible(self) -> str | None:
        """Why the method refuses this model."""
        return next((result["impossible"] for result in self.results if result.get("impossible")), None)

    @property
    def status(self) -> str:
        """"" for a row with numbers, else why it has none."""
        if not self.results:
            return NOT_RUN
        return "impossible" if self.impossible else ""

    def cell(self, metric: str) -> Cell | None:
        """Mean and spread over seeds; None where it was not measured."""
        values = [float(result["metrics"][metric]) for result in self.results if metric in result["metrics"]]
        return Cell.of(values) if values else None

    def mean_of(self, key: str) -> float | None:
        """Mean over seeds of a number of the result files."""
        values = [float(result[key]) for result in self.results if result.get(key) is not None]
        return statistics.fmean(values) if values else None

    def training(self, key: str) -> float | None:
        """Mean over seeds of a number of the training report."""
        reports = [result["training"] for result in self.results if result.get("training")]
        values = [float(report[key]) for report in reports if report.get(key) is not None]
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class StudyTable:
    """A table with what its rows found. results: the folder, for the questions."""

    table: Table
    rows: tuple[StudyRow, ...]
    lower: StudyRow | None
    upper: StudyRow | None
    others: dict[str, StudyRow]  # by source: rows of other tables that are compared with
    folder: Path

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric that some row measured, in order of first appearance."""
        return list(dict.fromkeys(m for row in self.rows for result in row.results for m in result["metrics"]))

    def columns(self, group: str | None = None) -> list[str]:
        """The metrics of a group of columns; the first group by default."""
        return columns_for(self.table.columns[group or next(iter(self.table.columns))], self.metrics)

    @cached_property
    def questions(self) -> dict[str, QuestionSet]:
        """Task name -> its questions, as the first row that has answers was asked them."""
        found: dict[str, QuestionSet] = {}
        for result in (result for row in self.rows for result in row.results):
            for name, kept in result.get("answers", {}).items():
                if name not in found:
                    found[name] = read_questions(self.folder, name, kept["questions_sha256"])
        return found

    def baseline(self, which: str, metric: str) -> float | None:
        """A blind baseline, or the ceiling of knowing what is there but not where, in percent; None where there is none."""
        task, _, kind = metric.partition("/")
        if task not in self.questions:
            return None
        return self.questions[task].baselines.get(which, {}).get(kind)

    def other_questions(self) -> list[str]:
        """Rows that were asked other questions than the first one: they are no rows of one table."""
        wrong = []
        for row in self.rows:
            for result in row.results:
                for name, kept in result.get("answers", {}).items():
                    if kept["questions_sha256"] != self.questions[name].sha256 and row.title not in wrong:
                        wrong.append(row.title)
        return wrong


# ------------------------------------------------------------------------------------------------ reading
def results_of(folder: Path, source: str) -> tuple[dict[str, Any], ...]:
    """The result files of "table/row", by seed; ValueError names one that is damaged."""
    found = []
    for path in sorted((folder / source).glob("*.json"), key=lambda path: (len(path.stem), path.stem)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); restore it from git, or remove it and build it again") from error
        if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
            raise ValueError(f"{path} has no 'metrics': not a result file")
        found.append(content | {"file": path})
    return tuple(found)


def first_tokens(folder: Path) -> dict[str, Any]:
    """What benchmarks/first_token.py wrote: the run, and {"table/row": {"ms", "low", "high"}} under "rows"; {} without it."""
    path = folder / "first_token.json"
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found | {"rows": {row: {name: float(ms) for name, ms in one.items()} for row, one in found["rows"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it from git, or run benchmarks/first_token.py again") from error


def row_of(experiments: Path, results: Path, table: str, name: str) -> StudyRow:
    """A row by its YAML file."""
    file = experiments / table / f"{name}.yaml"
    own, shown = read_experiment(file), followed(file)
    first_token = first_tokens(results).get("rows", {}).get(shown.name, {}).get("ms")
    found = results_of(results, shown.name)
    return StudyRow(name, own.title or name, own.note or shown.note, shown.name, found, first_token)


def load_table(name: str, experiments: Path, results: Path) -> StudyTable:
    """A table of study/experiments/tables.yaml; results without a YAML file follow at the end. ValueError for unknown names."""
    tables = read_tables(experiments)
    if name not in tables:
        raise ValueError(f"no table {name!r} in {experiments}; there are: {', '.join(tables)}")
    table = tables[name]
    rows = [row_of(experiments, results, name, row) for row in table.rows]
    shown = {row.source for row in rows}
    extra = sorted({path.parent.name for path in (results / name).glob("*/*.json")})
    for row in extra:
        if f"{name}/{row}" not in shown:
            rows.append(StudyRow(row, row, "no file in experiments/", f"{name}/{row}", results_of(results, f"{name}/{row}")))

    def elsewhere(source: str | None) -> StudyRow | None:
        return None if source is None else row_of(experiments, results, *source.split("/"))

    compared = {side: elsewhere(side) for pair in table.compare for side in (pair.first, pair.second)}
    others = {side: row for side, row in compared.items() if row is not None}
    return StudyTable(table, tuple(rows), elsewhere(table.lower), elsewhere(table.upper), others, results)


# ------------------------------------------------------------------------------------------------ numbers
def label(metric: str, columns: Sequence[str]) -> str:
    """Short name of a column: the kind alone where its task has most of the columns.

    >>> label("scenes/name", ["scenes/name", "scenes/count", "easy/open"]), label("easy/open", ["scenes/name", "easy/open"])
    ('name', 'easy/open')
    """
    task, _, kind = metric.partition("/")
    return kind if sum(other.startswith(f"{task}/") for other in columns) > 1 else metric


def mean_score(row: StudyRow, columns: Sequence[str]) -> Cell | None:
    """Plain mean over columns, with its spread over seeds; None unless every column was measured."""
    values = [
        statistics.fmean(float(result["metrics"][column]) for column in columns)
        for result in row.results
        if columns and all(column in result["metrics"] for column in columns)
    ]
    return Cell.of(values) if values else None


def separating(study: StudyTable, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Columns that the bounds separate by MIN_APART points, and the others."""
    if study.lower is None or study.upper is None:
        return [], list(columns)
    apart = []
    for column in columns:
        lower, upper = study.lower.cell(column), study.upper.cell(column)
        if lower is not None and upper is not None and upper.mean - lower.mean >= MIN_APART:
            apart.append(column)
    return apart, [column for column in columns if column not in apart]


def retention(study: StudyTable, row: StudyRow, columns: Sequence[str]) -> tuple[RowMean, RowMean] | None:
    """(Table 1's formula, Table 2's) over these columns; None where row or bounds lack one, or there are fewer than two."""
    if study.lower is None or study.upper is None or len(columns) < 2:
        return None
    cells = [{column: each.cell(column) for column in columns} for each in (row, study.lower, study.upper)]
    if any(cell is None for side in cells for cell in side.values()):
        return None
    scores, lower, upper = ({column: cell.mean for column, cell in side.items() if cell} for side in cells)
    return row_mean(row_between(scores, lower, upper)), row_mean(row_of_upper(scores, upper))


def right_of(row: StudyRow, task: str, seeds: Sequence[int] | None = None) -> tuple[np.ndarray, str] | None:
    """Share of seeds that answered each question right, and the hash of the questions."""
    chosen = [r for r in row.results if task in r.get("answers", {}) and (seeds is None or r["seed"] in seeds)]
    if not chosen:
        return None
    kept = [result["answers"][task] for result in chosen]
    hashes = {one["questions_sha256"] for one in kept}
    if len(hashes) > 1:
        raise ValueError(f"{row.source}: its seeds were asked different questions of {task}; build them again")
    right = np.mean([unpacked_bits(one["right"], one["n_questions"]) for one in kept], axis=0)
    return right, hashes.pop()


@dataclass(frozen=True)
class Compared:
    """A comparison on one metric. seeds: of each row that entered, the same ones where there are some.

    by_seed: the difference in points of each seed that both have; the interval is over pictures, it does not hold their spread.
    """

    comparison: Comparison
    metric: str
    difference: Difference
    n_seeds: tuple[int, int]
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """"above", "below" or "cannot tell", by the interval."""
        return "above" if self.difference.low > 0 else "below" if self.difference.high < 0 else "cannot tell"


def compared(study: StudyTable, comparison: Comparison, metric: str) -> Compared | None:
    """Two rows on the questions of a metric, pictures resampled; None where one was not run or was asked others."""
    first, second = study.others[comparison.first], study.others[comparison.second]
    task, _, kind = metric.partition("/")
    seeds = [{int(result["seed"]) for result in row.results} for row in (first, second)]
    common = sorted(seeds[0] & seeds[1])
    sides = [right_of(row, task, common or None) for row in (first, second)]
    if sides[0] is None or sides[1] is None or sides[0][1] != sides[1][1]:
        return None
    questions = read_questions(study.folder, task, sides[0][1])
    chosen = questions.of_kind(kind)
    images = [str(image) for image in questions.image_of[chosen]]
    difference = paired_bootstrap(
        sides[0][0][chosen].tolist(), sides[1][0][chosen].tolist(), images, n_resamples=N_RESAMPLES
    )
    n = (len(common), len(common)) if common else (len(seeds[0]), len(seeds[1]))
    by_seed = []
    for seed in common:
        one, other = right_of(first, task, [seed]), right_of(second, task, [seed])
        if one is not None and other is not None:
            by_seed.append(100 * float((one[0] - other[0])[chosen].mean()))
    return Compared(comparison, metric, difference, n, tuple(by_seed))


def headlines(study: StudyTable) -> list[str]:
    """What a comparison is summed up by: for "task/*" all questions of the task, other columns as they are."""
    patterns = [pattern for group in study.table.columns.values() for pattern in group]
    return list(dict.fromkeys(f"{p[:-2]}/score" if p.endswith("/*") else p for p in patterns))
