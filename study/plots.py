"""Plots of a study's tables: scores of all rows beside bounds, blind baselines and ceiling; accuracy against tokens.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from study.study_tables import BLIND, StudyRow, StudyTable, label, mean_score

INK, ACCENT, GREY = "#1f5fa8", "#c1440e", "#8a929c"
COLOURS = ("#1f5fa8", "#c1440e", "#2e8b57", "#8e5ea2", "#b8860b", "#008b8b", "#cd5c5c", "#556b2f", "#4b0082", "#708090",
           "#d2691e", "#20b2aa", "#800000", "#7f7f00")  # fmt: skip


def draw(study: StudyTable, file: Path) -> None:
    """A PNG: lines over tokens for tables that name lines, else a heat map of scores with the mean of each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    make = _lines if study.table.lines else _scores
    figure = make(study, plt)
    figure.suptitle(study.table.title, fontsize=11)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _reference(study: StudyTable, which: str, columns: list[str]) -> float | None:
    """Mean over columns of a blind baseline."""
    values = [study.baseline(which, column) for column in columns]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if values and len(known) == len(values) else None


def _scores(study: StudyTable, plt: Any) -> Any:
    """Left: mean of each row, a dot per seed. Right: score by column."""
    columns, rows = study.columns(), list(study.rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(3.5 + 3 + 0.62 * len(columns), 1.9 + 0.36 * len(rows)), layout="constrained", sharey=True,
        width_ratios=[3, 0.62 * len(columns) + 0.5],
    )  # fmt: skip
    for y, row in enumerate(rows):
        _dots(left, y, row, columns)
    lines = [(mean_score(bound, columns), name) for bound, name in ((study.lower, "lower"), (study.upper, "upper")) if bound]
    for cell, name in lines:
        if cell is not None:
            left.axvline(cell.mean, color=GREY, linewidth=1, linestyle="-")
            left.text(cell.mean, -0.8, f" {name} ", ha="left" if name == "lower" else "right", fontsize=7, color=GREY)
    blind = _reference(study, BLIND[0], columns)
    if blind is not None:
        left.axvline(blind, color=ACCENT, linewidth=1, linestyle=":")
        left.text(blind, len(rows) - 0.4, " question only", ha="left", va="center", fontsize=7, color=ACCENT)
    left.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=8)
    left.set(xlabel="mean over the columns, %", ylim=(len(rows) - 0.1, -1.2))
    left.grid(axis="x", alpha=0.25)
    _heat(right, study, rows, columns)
    return figure


def _dots(axes: Any, y: int, row: StudyRow, columns: list[str]) -> None:
    if row.status:
        axes.text(0.02, y, row.status, fontsize=7, color=GREY, va="center", transform=axes.get_yaxis_transform())
        return
    each = [[r["metrics"].get(column) for column in columns] for r in row.results]
    values = [statistics.fmean(v) for v in each if all(x is not None for x in v)]
    axes.plot(values, [y] * len(values), "o", color=INK, markersize=4, alpha=0.6)
    if values:
        axes.plot([statistics.fmean(values)], [y], "|", color=INK, markersize=13, markeredgewidth=2)


def _heat(axes: Any, study: StudyTable, rows: list[StudyRow], columns: list[str]) -> None:
    """Scores as numbers on a coloured ground; last the ceiling, where the task has one."""
    import numpy as np

    values = np.full((len(rows), len(columns)), np.nan)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            cell = row.cell(column)
            values[y, x] = np.nan if cell is None else cell.mean
    axes.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, x in np.argwhere(~np.isnan(values)):
        colour = "white" if values[y, x] > 60 else "black"
        axes.text(x, y, f"{values[y, x]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    names = []
    for column in columns:
        ceiling = study.baseline(BLIND[2], column)
        names.append(label(column, columns) + (f"\n(ceiling {ceiling:.0f})" if ceiling is not None and ceiling < 99 else ""))
    axes.set_xticks(range(len(columns)), names, rotation=60, ha="right", fontsize=7)
    axes.tick_params(length=0)


def _lines(study: StudyTable, plt: Any) -> Any:
    """Mean score against the tokens that enter the layers for a new picture, those that a question meets, and the time to the
    first token."""
    columns = study.columns()
    figure, panels = plt.subplots(1, 3, figsize=(13, 5), layout="constrained", sharey=True, width_ratios=[3, 3, 2])
    by_name = {row.name: row for row in study.rows}
    for colour, (name, members) in zip(COLOURS * 2, study.table.lines.items(), strict=False):
        points = []
        for row in (by_name[member] for member in members if member in by_name):
            cell, entering, met = mean_score(row, columns), row.mean_of("equivalent_tokens"), row.mean_of("cached_tokens")
            if cell is not None and entering is not None and met is not None:
                points.append((cell.mean, entering, met, row.first_token_ms))
        style = "--" if "(trained)" in name else "-"
        what = name if points else f"{name}: {_why(by_name, members)}"
        for number, panel in enumerate(panels, start=1):
            drawn = [(point[number], point[0]) for point in points if point[number] is not None]
            form, label = "o" if number == 3 else f"o{style}", what if number == 1 else None
            panel.plot([x for x, _ in drawn], [y for _, y in drawn], form, color=colour, markersize=4, label=label)
    left = panels[0]
    for bound, name in ((study.upper, "uncompressed"), (study.lower, "lower bound")):
        cell = None if bound is None else mean_score(bound, columns)
        if cell is not None:
            left.axhline(cell.mean, color=GREY, linewidth=1)
            left.text(1, cell.mean, name, fontsize=7, color=GREY, va="bottom", transform=left.get_yaxis_transform(), ha="right")
    left.set(xlabel="visual tokens that enter, mean over layers (a new picture)", ylabel="mean over the columns, %")
    panels[1].set(xlabel="visual tokens a question meets, mean over layers")
    panels[2].set(xlabel="first token of 32 questions, ms")
    for axes in panels:
        axes.grid(alpha=0.25)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _why(by_name: dict[str, StudyRow], members: tuple[str, ...]) -> str:
    """Why a line has no point."""
    states = {by_name[member].status for member in members if member in by_name}
    return " / ".join(sorted(state for state in states if state)) or "not run"
