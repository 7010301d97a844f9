"""Learning curves of the rows that the fast trainer trained: right answers on watched pictures over steps.

Source:  ours; study/results/TABLE/ROW/SEED.jsonl, a run's metrics.jsonl.
Differs: the pictures are watched in training, and no test pictures (study/experiments/tiny/common.yaml).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.plots import COLOURS
from study.study_tables import StudyTable

STEP_TIMES = "step_time.json"
Curve = list[tuple[int, dict[str, float]]]  # step, score by watched set


def records(study: StudyTable) -> dict[str, list[Curve]]:
    """Row's title -> a curve a seed; rows without records are left out."""
    found: dict[str, list[Curve]] = {}
    for row in study.rows:
        curves = [curve(file) for file in sorted((study.folder / row.source).glob("*.jsonl"))]
        if any(curves):
            found[row.title] = [one for one in curves if one]
    return found


def curve(file: Path) -> Curve:
    """What a record says of right answers, in percent."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["step"], {name: right["score"] for name, right in row["right"].items()}) for row in rows if "right" in row]


def equal_time(study: StudyTable) -> list[list[str]]:
    """What each row had learned by the time in which the first timed one makes all its steps; only the heading without times.

    Times of a step: TABLE/step_time.json (`python -m study step-time`). A row is as it was measured last before that time,
    at a learning rate that had not fallen to its end: slower rows look worse here than a shorter run of theirs would.
    """
    curves, found = records(study), step_times(study)
    lines = [["row", "time of a step", "steps in that time", *(watched := watched_sets(curves)), "seeds"]]
    if found is None or not curves:
        return lines
    times = found["rows"]
    timed = {row.title: times[row.name]["median_s"] for row in study.rows if row.title in curves and row.name in times}
    first = next((row.title for row in study.rows if row.name == found["ratio_to"] and row.title in timed), None)
    if first is None:
        return lines
    budget = timed[first] * max(step for one in curves[first] for step, _ in one) * (1 + 1e-9)
    for title, one_curve in curves.items():
        if title not in timed:
            lines.append([title, "not timed", *[""] * (len(watched) + 1), str(len(one_curve))])
            continue
        reached = [[(step, scores) for step, scores in one if step * timed[title] <= budget] for one in one_curve]
        reached = [one for one in reached if one]
        means = [mean_of([one[-1][1][name] for one in reached if name in one[-1][1]]) for name in watched]
        step = f"{reached[0][-1][0]:,}" if reached else "none measured"
        lines.append([title, f"{timed[title] / timed[first]:.2f}", step, *means, str(len(reached))])
    return lines


def step_times(study: StudyTable) -> dict[str, Any] | None:
    """What `python -m study step-time` wrote for this table; None where it was not run."""
    file = study.folder / study.table.name / STEP_TIMES
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def mean_of(scores: Sequence[float]) -> str:
    """One decimal; "" of none: not every run watches the same sets."""
    return f"{sum(scores) / len(scores):.1f}" if scores else ""


def watched_sets(found: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Names of the sets that are watched in training, of what `records` gives."""
    every = (scores for curves in found.values() for one in curves for _, scores in one)
    return list(dict.fromkeys(name for scores in every for name in scores))


def draw_curves(study: StudyTable, file: Path) -> None:
    """A PNG: a panel for each watched set, a colour a row, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = records(study)
    names = watched_sets(found)
    size = (4.6 * len(names), 4.6)
    figure, panels = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for panel, name in zip(panels[0], names, strict=True):
        for colour, (title, curves) in zip(COLOURS, found.items(), strict=False):
            _draw_row(panel, colour, title, [[(step, s[name]) for step, s in one if name in s] for one in curves])
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("right answers, %")
    named = panels[0][0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=max(1, len(names)), fontsize=8, frameon=False)
    figure.suptitle(f"{study.table.title}: learning curves", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw_row(panel: Any, colour: str, title: str, curves: list[list[tuple[int, float]]]) -> None:
    label: str | None = title
    for points in curves:
        if points:
            panel.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, linewidth=1.2, label=label)
            label = None
