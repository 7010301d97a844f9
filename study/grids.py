"""The numbers of a table as rows of text: scores, retention, cost, differences, everything for a CSV.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from htc_vlm.eval.retention import RowMean
from study.study_tables import (
    BLIND,
    NOT_RUN,
    Compared,
    StudyRow,
    StudyTable,
    compared,
    headlines,
    label,
    mean_score,
    retention,
    separating,
)
from study.tables import Cell


def _text(value: float | Cell | None, form: str = ".1f") -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, Cell) else format(value, form)


def scores_grid(study: StudyTable, group: str | None = None) -> list[list[str]]:
    """Tokens a question meets, every column, their mean, seeds; then blind baselines and the ceiling."""
    columns = study.columns(group)
    lines = [["row", "tokens", *(label(column, columns) for column in columns), "mean", "seeds"]]
    for row in study.rows:
        tokens = row.mean_of("cached_tokens")
        cells = [_text(row.cell(column)) for column in columns]
        if row.status:
            cells[0] = row.status
        seeds = str(len(row.results)) if not row.status else ""
        lines.append([row.title, _text(tokens, "g"), *cells, _text(mean_score(row, columns)), seeds])
    for which in BLIND:
        values = [study.baseline(which, column) for column in columns]
        if any(value is not None for value in values):
            known = [value for value in values if value is not None]
            mean = statistics.fmean(known) if len(known) == len(values) else None
            name = "*ceiling: knows what, not where*" if which == "bag of things" else f"*blind: {which}*"
            lines.append([name, "", *(_text(value) for value in values), _text(mean), ""])
    return lines


def entries_grid(study: StudyTable) -> list[list[str]]:
    """What the first entries of an elastic row keep: a line a budget, means over its seeds."""
    metrics = headlines(study)
    lines = [["row", "entries", *(metric.removesuffix("/score") for metric in metrics)]]
    for row in study.rows:
        for n_entries in dict.fromkeys(n for result in row.results for n in result.get("by_entries", ())):
            found = [result["by_entries"][n_entries]["metrics"] for result in row.results if n_entries in result["by_entries"]]
            means = (statistics.fmean(one[metric] for one in found) for metric in metrics)
            lines.append([row.title, n_entries, *(f"{mean:.1f}" for mean in means)])
    return lines


def retention_grid(study: StudyTable) -> list[list[str]]:
    """Both formulas, each as printed, capped at 100 %, without its most generous column; in percent."""
    columns, _ = separating(study, study.columns())
    ways = ("capped", "without the best column")
    heads = ["between the bounds", *ways, "of the upper bound", *ways]
    lines = [["row", *heads]]
    for row in study.rows:
        both = retention(study, row, columns)
        cells = [""] * len(heads)
        if row.status:
            cells[0] = row.status
        elif both is not None:
            cells = [part for mean in both for part in _means(mean, columns)]
        lines.append([row.title, *cells])
    return lines


def _means(mean: RowMean, columns: Sequence[str]) -> list[str]:
    without = f"{mean.without_most_generous:.1f} ({label(mean.most_generous, columns)})"
    return [f"{mean.printed:.1f}", f"{mean.capped:.1f}", without]


def cost_grid(study: StudyTable) -> list[list[str]]:
    """What a row costs: tokens, time to the first token, training."""
    head = ["row", "tokens entering, mean of layers", "tokens a question meets", "any question", "weights, million"]
    lines = [[*head, "first token, ms (32 questions)", "steps", "training, s", "pictures/s", "evaluation, s", "device"]]
    for row in study.rows:
        if row.status:
            lines.append([row.title, row.status, *[""] * 9])
            continue
        weights = row.mean_of("parameters")
        independent = {bool(result.get("question_independent", True)) for result in row.results}
        lines.append([
            row.title,
            _text(row.mean_of("equivalent_tokens")),
            _text(row.mean_of("cached_tokens")),
            "yes" if independent == {True} else "no",
            _text(None if weights is None else weights / 1e6, ".2f"),
            _text(row.first_token_ms),
            _text(row.training("steps"), ",.0f"),
            _text(row.training("seconds"), ",.0f"),
            _text(row.training("images_per_second")),
            _text(row.mean_of("evaluation_seconds"), ",.0f"),
            ", ".join(sorted({str(result.get("device", "")) for result in row.results})),
        ])  # fmt: skip
    return lines


def lines_grid(study: StudyTable) -> list[list[str]]:
    """One line per method of a table with budgets: mean score and retention of the upper bound, tokens in brackets."""
    columns = study.columns()
    apart, _ = separating(study, columns)
    by_name = {row.name: row for row in study.rows}
    n_most = max(map(len, study.table.lines.values()), default=0)
    budgets = next((list(rows) for rows in study.table.lines.values() if len(rows) == n_most), [])
    out = [["method", *(f"@{row.rsplit('-', 1)[-1]}" for row in budgets)]]
    for name, members in study.table.lines.items():
        out.append([name, *(_point(study, by_name.get(member), columns, apart) for member in members)])
    return out


def _point(study: StudyTable, row: StudyRow | None, columns: Sequence[str], apart: Sequence[str]) -> str:
    if row is None or row.status:
        return NOT_RUN if row is None else row.status
    cell, both = mean_score(row, columns), retention(study, row, apart)
    kept = f", {both[1].printed:.1f} %" if both else ""
    return f"{_text(cell)}{kept} ({_text(row.mean_of('cached_tokens'), '.3g')})"


def differences_grid(study: StudyTable) -> list[list[str]]:
    """For each comparison the difference in points with its 95 % interval, by headline; bold where it excludes 0."""
    metrics = headlines(study)
    lines = [["comparison", *(_headline(metric) for metric in metrics), "seeds"]]
    for comparison in study.table.compare:
        found = [compared(study, comparison, metric) for metric in metrics]
        cells = [NOT_RUN if one is None else interval_text(one) for one in found]
        some = next((one for one in found if one is not None), None)
        lines.append([comparison.asks, *cells, "" if some is None else seeds_text(some.n_seeds)])
    return lines


def _headline(metric: str) -> str:
    return f"{metric.removesuffix('/score')}, all" if metric.endswith("/score") else metric


def interval_text(one: Compared) -> str:
    """Points and interval; bold where zero is outside."""
    text = f"{one.difference.points:+.1f} [{one.difference.low:+.1f}, {one.difference.high:+.1f}]"
    return text if one.verdict == "cannot tell" else f"**{text}**"


def seeds_text(n_seeds: tuple[int, int]) -> str:
    """
    >>> seeds_text((3, 3)), seeds_text((3, 1))
    ('3', '3 and 1')
    """
    return str(n_seeds[0]) if n_seeds[0] == n_seeds[1] else f"{n_seeds[0]} and {n_seeds[1]}"


def csv_grid(study: StudyTable) -> list[list[str]]:
    """Every metric of every row, mean and deviation over seeds, unrounded enough to compute with."""
    numbers: dict[str, Callable[[StudyRow], float | None]] = {
        "equivalent_tokens": lambda row: row.mean_of("equivalent_tokens"),
        "cached_tokens": lambda row: row.mean_of("cached_tokens"),
        "first_token_ms": lambda row: row.first_token_ms,
        "training_seconds": lambda row: row.training("seconds"),
    }
    metrics = study.metrics
    lines = [["row", "title", "results", "status", "seeds", *numbers, *(x for m in metrics for x in (m, f"{m} (sd)"))]]
    for row in study.rows:
        cells = [row.cell(metric) for metric in metrics]
        values = [_text(number(row), ".3f") for number in numbers.values()]
        pairs = [x for c in cells for x in (_text(c.mean if c else None, ".3f"), _text(c.deviation if c else None, ".3f"))]
        lines.append([row.name, row.title, row.source, row.status, str(len(row.results)), *values, *pairs])
    for which in BLIND:
        blind = [study.baseline(which, metric) for metric in metrics]
        if any(value is not None for value in blind):
            pairs = [x for value in blind for x in (_text(value, ".3f"), "")]
            lines.append([which, which, "questions", "", "", *[""] * len(numbers), *pairs])
    return lines


def refusals(study: StudyTable) -> list[tuple[str, str]]:
    """(title, why) of rows that a method refuses."""
    return [(row.title, row.impossible) for row in study.rows if row.impossible]
