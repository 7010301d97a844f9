"""How much of the uncompressed model a score keeps: the paper's two formulas, under two names.

Source:  HTC-VLM, Table 1 (between lower and upper bound) and Table 2 (share of the upper bound).
Differs: a row's mean is always given three ways: as printed (plain mean), capped at 100 %, and without the column
         that flatters the row most. The first alone hides that one narrow column can carry a row.

The two formulas are not on one scale: Table 1's HTC row is 87.2 % between the bounds and 93.1 % of the upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def retention_between(score: float, lower: float, upper: float) -> float:
    """Table 1: 100 (score - lower) / (upper - lower), in percent; ValueError when the bounds are not lower < upper.

    The paper's HTC row, GQA and ScienceQA (whose bounds are 5.8 points apart):

    >>> round(retention_between(57.6, 37.7, 61.1), 1), round(retention_between(67.7, 60.7, 66.5), 1)
    (85.0, 120.7)
    """
    if not lower < upper:
        raise ValueError(f"retention needs lower < upper, got lower={lower}, upper={upper}")
    return 100.0 * (score - lower) / (upper - lower)


def retention_of_upper(score: float, upper: float) -> float:
    """Table 2: 100 score / upper, in percent; ValueError unless upper > 0.

    The paper's HTC row at 64 tokens, GQA:

    >>> round(retention_of_upper(60.3, 61.9), 1)
    97.4
    """
    if not upper > 0:
        raise ValueError(f"retention needs an upper bound above 0, got {upper}")
    return 100.0 * score / upper


@dataclass(frozen=True)
class RowMean:
    """One row's mean retention in percent, three ways. `most_generous` is the column that the last one leaves out."""

    printed: float
    capped: float
    without_most_generous: float
    most_generous: str


def row_mean(retentions: Mapping[str, float]) -> RowMean:
    """Mean of a row of retentions (column -> percent), as printed, capped at 100 %, without the highest column.

    The paper's HTC row: 87.2 as printed rests on ScienceQA's 120.7.

    >>> htc = {"GQA": 85.04, "VQAv2": 85.48, "MMB": 90.41, "MME": 74.48, "POPE": 92.93, "SEED": 61.43, "SQA": 120.69}
    >>> row = row_mean(htc)
    >>> round(row.printed, 1), round(row.capped, 1), round(row.without_most_generous, 1), row.most_generous
    (87.2, 84.3, 81.6, 'SQA')
    """
    if len(retentions) < 2:
        raise ValueError(f"a row mean needs at least two columns, got {dict(retentions)}")
    most = max(retentions, key=retentions.__getitem__)
    rest = [value for column, value in retentions.items() if column != most]
    return RowMean(
        printed=sum(retentions.values()) / len(retentions),
        capped=sum(min(100.0, value) for value in retentions.values()) / len(retentions),
        without_most_generous=sum(rest) / len(rest),
        most_generous=most,
    )


def row_between(
    scores: Mapping[str, float], lower: Mapping[str, float], upper: Mapping[str, float]
) -> dict[str, float]:
    """Table 1's percentages of one row; ValueError names columns without a bound."""
    missing = [column for column in scores if column not in lower or column not in upper]
    if missing:
        raise ValueError(f"no lower or upper bound for {', '.join(missing)}")
    return {column: retention_between(score, lower[column], upper[column]) for column, score in scores.items()}


def row_of_upper(scores: Mapping[str, float], upper: Mapping[str, float]) -> dict[str, float]:
    """Table 2's percentages of one row; ValueError names columns without an upper bound."""
    missing = [column for column in scores if column not in upper]
    if missing:
        raise ValueError(f"no upper bound for {', '.join(missing)}")
    return {column: retention_of_upper(score, upper[column]) for column, score in scores.items()}
