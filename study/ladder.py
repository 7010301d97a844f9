"""The shipped models beside one another: right answers by kind of question, and against the bytes that an image costs.

Source:  ours; study/results/tiny (whole test sets) and study/results/{table4,beyond} (HTC in a short recipe).
Differs: nothing known.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from study.tables import to_markdown

SHIPPED = {  # model -> (title, cache entries an image)
    "tiny-upper": ("`tiny-upper`, uncompressed", 36),
    "tiny": ("`tiny`: eight readers, two looks", 1),
    "tiny-htc": ("`tiny-htc`: HTC as printed (Eq. 6)", 1),
    "tiny-lower": ("an untrained bottleneck", 1),
}
BYTES = 6144  # of one entry: 6 layers, 8 key-value heads of 16, keys and values in float32
TASKS = {"pictograms-test": "seen vendors", "pictograms-test-unseen": "unseen vendor"}
# rows -> entries an image
SHORT = {"table4/causal-anchors": 1, "beyond/bottleneck-2": 2, "beyond/bottleneck-4": 4, "beyond/bottleneck-16": 16}


def load(results: Path, model: str, task: str) -> dict[str, Any] | None:
    """One result file; None where there is none."""
    file = results / "tiny" / model / f"{task}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def kept(model: dict[str, float], lower: dict[str, float], upper: dict[str, float]) -> dict[str, float]:
    """Kind -> share of the way from the lower to the upper bound, in percent, at most 100.

    >>> kept({"score": 1, "name": 75.0, "size": 99.0}, {"score": 1, "name": 50.0, "size": 50.0},
    ...      {"score": 1, "name": 100.0, "size": 98.0})
    {'name': 50.0, 'size': 100.0}
    """
    kinds = [kind for kind in upper if kind != "score" and upper[kind] > lower[kind]]
    return {kind: min(100.0, 100 * (model[kind] - lower[kind]) / (upper[kind] - lower[kind])) for kind in kinds}


def grid(results: Path, task: str) -> list[list[str]]:
    """A line a model: bytes of an image, all questions, what is kept between the bounds, each kind."""
    bounds = [load(results, name, task) for name in ("tiny-lower", "tiny-upper")]
    if any(bound is None for bound in bounds):
        return []
    lower, upper = (bound["metrics"] for bound in bounds if bound is not None)
    kinds = [kind for kind in upper if kind != "score"]
    lines = [["model", "bytes an image", "all", "kept, %", *kinds]]
    for name, (title, n_entries) in SHIPPED.items():
        found = load(results, name, task)
        if found is not None:
            metrics = found["metrics"]
            mean = statistics.fmean(kept(metrics, lower, upper).values())
            cells = [f"{metrics[kind]:.1f}" for kind in ("score", *kinds)]
            lines.append([title, f"{BYTES * n_entries:,}", cells[0], f"{mean:.1f}", *cells[1:]])
    return lines


def section(results: Path) -> str:
    """The part of docs/results.md; empty where there are no results."""
    parts = ["## The shipped models, one cache entry an image"]
    told = (
        "Whole test sets, one seed each. *Kept*: mean over kinds of the way from an untrained bottleneck to the uncompressed "
        "model, each kind at most 100 %. `tiny` writes its entry with eight rows that look twice (compressors/readers.py): 16 "
        "rows beside 36 patches while an image is read, where HTC has one beside 40; the entry costs the same bytes. The "
        "models were trained on other questions for other times (docs/training.md), so this compares shipped models, not "
        "methods at equal training."
    )
    parts.append(told)
    for task, title in TASKS.items():
        lines = grid(results, task)
        if lines:
            parts += [f"**{title}**", to_markdown(lines)]
    parts.append("![Right answers against bytes an image](assets/results/ladder.png)")
    return "\n\n".join(parts) if len(parts) > 3 else ""


def short_rows(results: Path) -> list[tuple[int, float]]:
    """(bytes, mean over seeds of the score on seen vendors) of HTC's rows with causal patches, 800 steps each."""
    points = []
    for row, n_entries in SHORT.items():
        files = sorted((results / row).glob("*.json"))
        scores = [json.loads(file.read_text())["metrics"].get("pictograms-seen/score") for file in files]
        known = [score for score in scores if score is not None]
        if known:
            points.append((BYTES * n_entries, statistics.fmean(known)))
    return points


def elastic_row(results: Path) -> list[tuple[int, float]]:
    """(bytes, mean over seeds of the score on seen vendors) of the row that was trained with 1, 2, 4 and 8 entries."""
    scores: dict[int, list[float]] = {}
    for file in sorted((results / "long" / "readers-elastic").glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        by_entries = {int(n): one["metrics"] for n, one in found["by_entries"].items()}
        for n_entries, metrics in {**by_entries, round(found["cached_tokens"]): found["metrics"]}.items():
            scores.setdefault(n_entries, []).append(metrics["pictograms-seen/score"])
    return [(BYTES * n_entries, statistics.fmean(values)) for n_entries, values in sorted(scores.items())]


def draw(results: Path, file: Path) -> None:
    """Right answers on seen vendors against the bytes an image costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, (title, n_entries) in SHIPPED.items():
        found = load(results, name, "pictograms-test")
        if found is not None:
            score = found["metrics"]["score"]
            axes.plot(BYTES * n_entries, score, "o", color="#c1440e" if name == "tiny" else "#1f5fa8")
            left = n_entries > 1
            axes.annotate(
                title.replace("`", ""), (BYTES * n_entries, score), (-6 if left else 6, -8), textcoords="offset points",
                ha="right" if left else "left", va="center", fontsize=8,
            )  # fmt: skip
    for label, points, style, color in (
        ("readers, one elastic model", elastic_row(results), "^:", "#c1440e"),
        ("HTC, patches causal, 800 steps", short_rows(results), "s--", "#8a929c"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=label)
    axes.legend(fontsize=8, loc="lower right")
    axes.set(xscale="log", xlabel="bytes of an image in the cache", ylabel="right answers, % (seen vendors)", ylim=(10, 102))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
