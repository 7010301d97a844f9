"""The paired bootstrap."""

from __future__ import annotations

import pytest

from htc_vlm.eval.compare import paired_bootstrap


def test_a_constant_gain_has_no_spread() -> None:
    """Every picture gains one of two questions: 50 points, interval of width 0. Prevents an unpaired interval."""
    images = [str(i // 2) for i in range(20)]
    gain = paired_bootstrap([1, 1] * 10, [1, 0] * 10, images, n_resamples=200)
    assert (gain.points, gain.low, gain.high, gain.share_above_zero) == (50, 50, 50, 1)
    assert (gain.n_questions, gain.n_images) == (20, 10)


def test_questions_of_one_picture_count_once_for_the_spread() -> None:
    """Ten copies of each picture's question must not narrow the interval. Prevents resampling single questions."""
    first, second, images = [1, 0, 1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1, 0, 0], list("abcdefgh")
    once = paired_bootstrap(first, second, images)
    ten_times = paired_bootstrap(first * 10, second * 10, images * 10)
    assert ten_times.points == pytest.approx(once.points) == 25
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))
    assert once.low < 0 < once.high


def test_the_seed_decides_and_pairs_are_needed() -> None:
    """Prevents an interval that cannot be repeated, and scores that belong to different questions."""
    arguments = [1, 0, 1, 0], [0, 0, 1, 1], list("abcd")
    assert paired_bootstrap(*arguments, seed=3) == paired_bootstrap(*arguments, seed=3)
    with pytest.raises(ValueError, match="pairs needed"):
        paired_bootstrap([1], [1, 0], ["a", "b"])
    with pytest.raises(ValueError, match="at least two"):
        paired_bootstrap([1, 0], [1, 0], ["a", "a"])
