"""Two models on the same questions: the difference of their scores with a paired bootstrap interval.

Source:  Efron and Tibshirani 1993, chapter 13 (percentile interval), pairs resampled together.
Differs: pictures are resampled, not questions: the questions of one picture rise and fall together, and an interval
         over single questions would be too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """first - second in points of percent, with its interval; `share_above_zero` of the resamples favour the first."""

    points: float
    low: float
    high: float
    share_above_zero: float
    n_questions: int
    n_images: int


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    images: Sequence[str],
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Difference of two models' mean scores (shares of 1, one per question), resampling pictures.

    The i-th entry of all three belongs to one question. Raises ValueError on unequal lengths or fewer than two
    pictures.

    >>> same = paired_bootstrap([1, 0, 1, 1], [1, 0, 1, 1], ["a", "a", "b", "c"])
    >>> same.points, same.low, same.high
    (0.0, 0.0, 0.0)
    """
    if not len(first) == len(second) == len(images):
        raise ValueError(f"pairs needed, got {len(first)} and {len(second)} scores for {len(images)} images")
    names, image_of = np.unique(np.asarray(images), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a bootstrap over pictures needs at least two, got {len(names)}")
    gain = np.bincount(image_of, weights=np.asarray(first, float) - np.asarray(second, float))  # (images,)
    n_asked = np.bincount(image_of)
    generator = np.random.default_rng(seed)
    differences = np.empty(n_resamples)
    for start in range(0, n_resamples, 1000):  # a thousand at a time bounds the memory
        drawn = generator.integers(len(names), size=(min(1000, n_resamples - start), len(names)))
        differences[start : start + len(drawn)] = gain[drawn].sum(1) / n_asked[drawn].sum(1)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        points=100 * float(gain.sum() / n_asked.sum()),
        low=100 * float(low),
        high=100 * float(high),
        share_above_zero=float((differences > 0).mean()),
        n_questions=len(first),
        n_images=len(names),
    )
