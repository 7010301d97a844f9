"""The published budgets of each method, from docs/specs/baselines.md sections 5 to 7, and what is refused."""

from __future__ import annotations

import pytest

from htc_vlm.ops.schedules import (
    PYRAMID_DROP,
    SparseVlmSettings,
    constant,
    fastv,
    fastv_keep,
    leaving,
    n_recyclable,
    pyramid_drop,
    pyramid_drop_keep,
    pyramid_drop_ratio,
    sparse_vlm,
    sparse_vlm_budget,
    sparse_vlm_scaled,
)


def mean(schedule: list[int]) -> float:
    return sum(schedule) / len(schedule)


@pytest.mark.parametrize(
    ("budget", "layer", "n_keep"), [(192, 2, 166), (128, 2, 98), (64, 2, 30), (192, 3, 152), (128, 3, 82), (64, 3, 11)]
)
def test_fastv_meets_its_budget_as_a_mean_over_layers(budget: int, layer: int, n_keep: int) -> None:
    """Keeping literally 192 after layer 2 is a mean of 216: papers differ, and the tables hide it."""
    assert fastv_keep(576, 32, budget, layer) == n_keep
    schedule = fastv(576, 32, n_keep, layer)
    assert schedule == [576] * layer + [n_keep] * (32 - layer)
    assert abs(mean(schedule) - budget) < 0.5
    assert mean(fastv(576, 32, 192, 2)) == 216


def test_fastv_refuses_what_it_cannot_do() -> None:
    """Layer 0 has no attention to go by; layer 32 does not exist; a mean of 30 is less than two full layers cost."""
    for layer in (0, 32):
        with pytest.raises(ValueError, match="layers between 1 and 31"):
            fastv(576, 32, 100, layer)
    for n_keep in (0, 577):
        with pytest.raises(ValueError, match=f"cannot keep {n_keep} of 576"):
            fastv(576, 32, n_keep, 2)
    with pytest.raises(ValueError, match="the mean must be between 36.9 and 576"):
        fastv_keep(576, 32, 30, layer=2)


def test_pyramid_drop_at_its_paper_setting_has_a_mean_of_270() -> None:
    """576, 288, 144 and 72 tokens for eight layers each."""
    schedule = pyramid_drop(576, 32, (8, 16, 24), (0.5, 0.25, 0.125))
    assert schedule == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8 and mean(schedule) == 270
    assert schedule == pyramid_drop(576, 32, (8, 16, 24), 0.5)


@pytest.mark.parametrize(
    ("budget", "kept", "average"),
    [(192, [322, 181, 101], 192.1), (128, [242, 102, 43], 128.4), (64, [110, 21, 4], 63.9)],
)
def test_pyramid_drop_meets_its_budgets(budget: int, kept: list[int], average: float) -> None:
    """int() as in the official code; rounding would give other counts."""
    stages, ratio = PYRAMID_DROP[budget]
    assert pyramid_drop_keep(576, 3, ratio) == kept
    assert round(mean(pyramid_drop(576, 32, stages, ratio)), 1) == average


def test_the_other_known_pyramid_settings() -> None:
    """Stages 8, 16, 24 with .2535 have 146, 37, 9; stages 2, 10, 20 with .32, .16, .08 a mean of 128."""
    assert pyramid_drop_keep(576, 3, 0.2535) == [146, 37, 9]
    assert round(mean(pyramid_drop(576, 32, (2, 10, 20), (0.32, 0.16, 0.08))), 1) == 128.0


@pytest.mark.parametrize("budget", [192, 128, 64])
def test_a_ratio_is_found_for_a_mean(budget: int) -> None:
    """As near as the settings that were solved by hand, or nearer."""
    ratio = pyramid_drop_ratio(576, 32, (2, 8, 16), budget)
    known = abs(mean(pyramid_drop(576, 32, *PYRAMID_DROP[budget])) - budget)
    assert abs(mean(pyramid_drop(576, 32, (2, 8, 16), ratio)) - budget) <= known


def test_pyramid_drop_refuses_what_it_cannot_do() -> None:
    """The official code indexes layer 32; stages 8, 16, 24 can never be below 144 on average."""
    with pytest.raises(ValueError, match="between 1 and 31"):
        pyramid_drop(576, 32, (8, 16, 32), 0.5)
    with pytest.raises(ValueError, match="increasing"):
        pyramid_drop(576, 32, (16, 8, 24), 0.5)
    with pytest.raises(ValueError, match="3 stages need as many ratios"):
        pyramid_drop(576, 32, (8, 16, 24), (0.5, 0.25))
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        pyramid_drop(576, 32, (8, 16, 24), 1.5)
    with pytest.raises(ValueError, match="cannot keep 0 of 4 visual tokens at layer 16"):
        pyramid_drop(100, 32, (2, 8, 16), 0.2)
    with pytest.raises(ValueError, match=r"the least is 163\.5.* never one of 18\.0 or less"):
        pyramid_drop_ratio(576, 32, (8, 16, 24), 64)


@pytest.mark.parametrize(
    ("budget", "tokens", "logged", "entering"),
    [
        (192, [309, 204, 113], 192.0, 206.5),
        (128, [312, 117, 39], 128.6, 145.4),
        (96, [249, 55, 27], 96.9, 114.1),
        (64, [82, 32, 18], 64.8, 82.3),
    ],
)
def test_sparse_vlm_costs_more_than_it_logs(budget: int, tokens: list[int], logged: float, entering: float) -> None:
    """SparseVLM's "64" is 82 tokens in FastV's and PyramidDrop's way to count (docs/specs/baselines.md section 7)."""
    schedule = sparse_vlm(576, 32, sparse_vlm_budget(budget, 576, 32))
    assert schedule == [576] * 3 + [tokens[0]] * 4 + [tokens[1]] * 9 + [tokens[2]] * 16
    assert mean(schedule) == pytest.approx(entering, abs=0.051)
    assert mean(leaving(schedule)) == pytest.approx(logged, abs=0.051)


@pytest.mark.parametrize(
    ("budget", "logged", "entering"), [(192, 192.4, 206.8), (128, 128.0, 144.1), (96, 96.8, 113.9), (64, 64.4, 81.8)]
)
def test_sparse_vlm_plus_recycles_nothing(budget: int, logged: float, entering: float) -> None:
    """The second version has other tables and no recycled tokens."""
    schedule = sparse_vlm(576, 32, sparse_vlm_budget(budget, 576, 32, plus=True))
    assert mean(schedule) == pytest.approx(entering, abs=0.051)
    assert mean(leaving(schedule)) == pytest.approx(logged, abs=0.051)


def test_the_share_of_recyclable_tokens_is_the_official_one() -> None:
    """276 dropped -> 83 clustered -> 9 new tokens."""
    assert n_recyclable(276) == 83
    assert sparse_vlm(576, 4, SparseVlmSettings((1,), (300,))) == [576, 576, 309, 309]
    assert sparse_vlm(576, 4, SparseVlmSettings((1,), (300,), recycle=False)) == [576, 576, 300, 300]


def test_sparse_vlm_refuses_what_it_cannot_do() -> None:
    """Its tables are for 576 patches in 32 layers; min(table, current - 1) would quietly drop one token."""
    with pytest.raises(ValueError, match="known: 192, 128, 96, 64"):
        sparse_vlm_budget(100, 576, 32)
    with pytest.raises(ValueError, match="for 576 patches and 32 layers, not 100 and 8"):
        sparse_vlm_budget(192, 100, 8)
    with pytest.raises(ValueError, match="cannot keep 300 of 100 tokens at layer 2"):
        sparse_vlm(100, 32, SparseVlmSettings((2,), (300,)))
    with pytest.raises(ValueError, match="between 1 and 31"):
        sparse_vlm(576, 32, SparseVlmSettings((31,), (300,)))
    with pytest.raises(ValueError, match="equally long"):
        sparse_vlm(576, 32, SparseVlmSettings((2, 6), (300,)))


def test_scaled_tables_keep_the_shares() -> None:
    """300, 200, 110 of 576 are 52, 35, 19 of 100; after 3, 7 and 16 of 32 layers is after 1, 2 and 4 of 8."""
    assert sparse_vlm_scaled(192, 100, 8) == SparseVlmSettings((0, 1, 3), (52, 35, 19))
    assert sparse_vlm_scaled(192, 576, 32) == sparse_vlm_budget(192, 576, 32)
    with pytest.raises(ValueError, match=r"4 layers are too few .* above 25\.0"):
        sparse_vlm_scaled(192, 100, 4)


def test_methods_before_the_language_model_are_constant() -> None:
    """Every layer sees what the first sees."""
    assert constant(64, 3) == [64, 64, 64]
