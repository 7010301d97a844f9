"""The plain reading of a study's tables: sentences chosen by the numbers and their intervals, none written beforehand.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from htc_vlm.eval.compare import paired_bootstrap
from study.paper import table1_rows
from study.study_tables import (
    BLIND,
    MIN_APART,
    N_RESAMPLES,
    Compared,
    StudyRow,
    StudyTable,
    compared,
    headlines,
    interval_text,
    kinds_of,
    label,
    retention,
    right_of,
    seeds_text,
    separating,
)

NEAR_BLIND = 2.0  # points above answering blind that are still no better than blind
CEILING_MEANS_SOMETHING = 95.0  # a ceiling above this binds nothing


def sentences(study: StudyTable) -> list[str]:
    """What the table says, in words; one sentence that nothing was run where nothing was."""
    n_run = sum(not row.status for row in study.rows)
    if not n_run:
        return ["No row of this table has been run yet."]
    return [*state(study), *retained(study), *no_better_than_blind(study), *comparisons(study), *bindings(study)]


def state(study: StudyTable) -> list[str]:
    """How much of the table there is."""
    n_run = sum(not row.status for row in study.rows)
    n_refused = sum(row.status == "impossible" for row in study.rows)
    n_missing = len(study.rows) - n_run - n_refused
    out = [f"{n_run} of {len(study.rows)} rows have results; impossible here: {n_refused}; not run: {n_missing}."]
    trained = trained_rows(study)
    if trained:
        steps = sorted({row.training("steps") or 0 for row in trained})
        seeds = sorted({len(row.results) for row in trained})
        told = f"{steps[0]:,.0f}" if len(steps) == 1 else f"{steps[0]:,.0f} to {steps[-1]:,.0f}"
        each = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        plural = "" if seeds == [1] else "s"
        out.append(f"Trained rows: {told} steps, {each} seed{plural} each, the same data in the same order.")
        if len(steps) > 1:
            out.append("The steps differ between rows: those rows are not comparable.")
    wrong = study.other_questions()
    if wrong:
        out.append(f"Asked other questions than the first row, and so not comparable: {', '.join(wrong)}.")
    return out


def trained_rows(study: StudyTable) -> list[StudyRow]:
    """Rows with a training run, each run once: rows that are `same_as` an earlier one are left out."""
    found: dict[str, StudyRow] = {}
    for row in study.rows:
        if not row.status and row.training("steps") is not None:
            found.setdefault(row.source, row)
    return list(found.values())


def retained(study: StudyTable) -> list[str]:
    """Retention of the rows that have one, best first, beside the paper's where it prints the same method."""
    columns, left_out = separating(study, study.columns())
    means = {row.title: both[0] for row in trained_rows(study) if (both := retention(study, row, columns))}
    out = []
    if left_out and columns:
        names = ", ".join(label(column, study.columns()) for column in left_out)
        out.append(f"Retention leaves out {names}: the bounds are less than {MIN_APART:g} points apart there.")
    if not columns:
        out.append(f"No column separates the bounds by {MIN_APART:g} points, so there is no retention.")
    if means:
        best = sorted(means.items(), key=lambda entry: -entry[1].capped)
        told = "; ".join(f"{title} {mean.capped:.1f} %" for title, mean in best)
        out.append(f"Kept between the bounds, capped at 100 %: {told}.")
    if study.table.name == "table1":
        paper = ", ".join(f"{row.name} {row.mean.printed:.1f} %" for row in table1_rows())
        out.append(f"The paper's Table 1, recomputed from its scores: {paper}.")
        out += _gain_beside_the_papers(study, columns)
    return out


def _gain_beside_the_papers(study: StudyTable, columns: Sequence[str]) -> list[str]:
    """HTC-VLM's retention minus VoCo-LLaMA's, here and in the paper."""
    rows = {row.name: retention(study, row, columns) for row in study.rows if row.name in ("htc", "voco")}
    htc, voco = rows.get("htc"), rows.get("voco")
    if htc is None or voco is None:
        return []
    paper = {row.name: row.mean.printed for row in table1_rows()}
    ours, theirs = htc[0].printed - voco[0].printed, paper["HTC"] - paper["VoCo"]
    return [f"HTC-VLM minus VoCo-LLaMA, in points of retention: {ours:+.1f} here, {theirs:+.1f} in the paper."]


def no_better_than_blind(study: StudyTable) -> list[str]:
    """In which columns of other tasks some trained rows answer as if without the picture, and which do better."""
    out = []
    for metric in (one for one in headlines(study) if not one.endswith("/score")):
        blind = study.baseline(BLIND[0], metric)
        if blind is None:
            continue
        scores = {row.title: cell.mean for row in trained_rows(study) if (cell := row.cell(metric)) is not None}
        at = [title for title, score in scores.items() if score <= blind + NEAR_BLIND]
        better = [f"{title} {score:.1f} %" for title, score in scores.items() if score > blind + NEAR_BLIND]
        if at:
            told = f" Better: {'; '.join(better)}." if better else ""
            out.append(f"{metric}: no better than without the picture ({blind:.1f} %): {'; '.join(at)}.{told}")
    return out


def comparisons(study: StudyTable) -> list[str]:
    """One sentence per comparison and task whose kinds are told apart, the first task's with the verdict in words."""
    out = []
    for comparison in study.table.compare:
        told: list[str] = []
        for metric in of_all_kinds(study):
            found = compared(study, comparison, metric)
            if found is not None:
                by_kind = [one for kind in kinds_of(study, metric) if (one := compared(study, comparison, kind)) is not None]
                told.append(_sentence(found, by_kind, short=bool(told)))
        if told:
            out.append(" ".join(told))
    return out


def short_grid(studies: Sequence[StudyTable], min_seeds: int = 1) -> list[list[str]]:
    """Every comparison in one line: difference over all questions of each task with its interval, and the verdict.

    min_seeds: leave out comparisons in which a row has fewer.
    """
    tasks = list(dict.fromkeys(metric for study in studies for metric in of_all_kinds(study)))
    lines = [["first against second, points", *(metric.partition("/")[0] for metric in tasks), "seeds", "so the first is"]]
    for study in studies:
        for comparison in study.table.compare:
            found = {metric: one for metric in tasks if (one := compared(study, comparison, metric)) is not None}
            if found and min(seeds := next(iter(found.values())).n_seeds) >= min_seeds:
                cells = [interval_text(found[metric]) if metric in found else "" for metric in tasks]
                lines.append([comparison.asks, *cells, seeds_text(seeds), verdict_of(found)])
    return lines


def verdict_of(found: Mapping[str, Compared]) -> str:
    """ "better", "worse", "better on TASK", ... where an interval leaves zero out; "not told apart" where none does.

    The interval is over pictures: a difference that some seed turns round is said to be one.
    """
    words = {"above": "better", "below": "worse"}
    told = {}
    for metric, one in found.items():
        if one.verdict in words:
            turned = any(points * one.difference.points <= 0 for points in one.by_seed)
            told[metric.partition("/")[0]] = words[one.verdict] + (" (not with every seed)" if turned else "")
    if len(told) == len(found) and len(set(told.values())) == 1:
        return next(iter(told.values()))
    return ", ".join(f"{word} on {task}" for task, word in told.items()) or "not told apart"


def of_all_kinds(study: StudyTable) -> list[str]:
    """ "task/score" of the tasks whose kinds of question are columns."""
    return [metric for metric in headlines(study) if metric.endswith("/score")]


def _sentence(found: Compared, by_kind: Sequence[Compared], short: bool) -> str:
    one = found.difference
    interval = f"{one.points:+.1f} points [{one.low:+.1f}, {one.high:+.1f}]"
    most = max(-one.low, one.high)
    verdict = {
        "above": f"better, {interval}",
        "below": f"worse, {interval}",
        "cannot tell": f"no difference that can be told, {interval}; more than {most:.1f} points are ruled out",
    }[found.verdict]
    asks = found.comparison.asks[0].upper() + found.comparison.asks[1:]
    text = f"{asks}: {verdict} (first minus second, {one.n_questions:,} questions about {one.n_images:,} pictures)."
    if short:
        text = f"On {found.metric.partition('/')[0]}: {interval}."
    told = [kind for kind in by_kind if kind.verdict != "cannot tell"]
    moved = [f"{kind.metric.partition('/')[2]} {kind.difference.points:+.1f}" for kind in told]
    if moved:
        text += f" By kind, intervals without zero: {', '.join(moved)}."
    if len(found.by_seed) > 1:
        text += f" By seed: {', '.join(f'{points:+.1f}' for points in found.by_seed)}."
    elif not short and min(found.n_seeds) == 1:
        text += " One seed: the interval does not hold the spread between seeds."
    return text


def bindings(study: StudyTable) -> list[str]:
    """In which kinds a compressed row is above or below the bag-of-things ceiling, by a bootstrap over pictures."""
    out = []
    for row in trained_rows(study):
        tasks = []
        for score in of_all_kinds(study):
            told = _beside_ceiling(study, row, kinds_of(study, score))
            if told:
                tasks.append(f"on {score.partition('/')[0]} {told}")
        if tasks:
            out.append(f"{row.title} against the ceiling of knowing what, but not where: {'; '.join(tasks)}.")
    return out


def _beside_ceiling(study: StudyTable, row: StudyRow, metrics: Sequence[str]) -> str:
    above, below = [], []
    for metric in metrics:
        low_high = _against_ceiling(study, row, metric)
        if low_high is not None and low_high[0] > 0:
            above.append(metric.partition("/")[2])
        if low_high is not None and low_high[1] < 0:
            below.append(metric.partition("/")[2])
    told = [f"above it in {', '.join(above)}"] if above else []
    told += [f"below it in {', '.join(below)}"] if below else []
    return ", ".join(told)


def _against_ceiling(study: StudyTable, row: StudyRow, metric: str) -> tuple[float, float] | None:
    """Interval of score minus ceiling in points; None where the ceiling says nothing or the row has no answers."""
    ceiling = study.baseline(BLIND[2], metric)
    task, _, kind = metric.partition("/")
    answered = right_of(row, task)
    if ceiling is None or ceiling > CEILING_MEANS_SOMETHING or answered is None:
        return None
    if answered[1] != study.questions[task].sha256:
        return None
    chosen = study.questions[task].of_kind(kind)
    right = answered[0][chosen]
    images = [str(image) for image in study.questions[task].image_of[chosen]]
    difference = paired_bootstrap(right.tolist(), np.full(len(right), ceiling / 100).tolist(), images, n_resamples=N_RESAMPLES)
    return difference.low, difference.high
