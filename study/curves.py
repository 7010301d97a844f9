"""Learning curves of the rows that the fast trainer trained: right answers on watched pictures over steps.

Source:  ours; study/results/TABLE/ROW/SEED.jsonl, a run's metrics.jsonl.
Differs: the pictures are watched in training, and no test pictures (study/experiments/tiny/common.yaml).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study.plots import COLOURS
from study.study_tables import StudyTable

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


def draw_curves(study: StudyTable, file: Path) -> None:
    """A PNG: a panel for each watched set, a colour a row, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = records(study)
    names = list(dict.fromkeys(name for curves in found.values() for one in curves for _, scores in one for name in scores))
    size = (4.6 * len(names), 3.8)
    figure, panels = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for panel, name in zip(panels[0], names, strict=True):
        for colour, (title, curves) in zip(COLOURS, found.items(), strict=False):
            _draw_row(panel, colour, title, [[(step, s[name]) for step, s in one if name in s] for one in curves])
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("right answers, %")
    panels[0][0].legend(fontsize=8, frameon=False)
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
