"""The probe on features whose answer is known."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.eval.compare import paired_bootstrap
from study.linear_probe import L2, fit, held_out, probe


def features(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def pictures(n: int) -> list[str]:
    return [str(i // 2) for i in range(n)]


def test_what_is_separable_is_read_without_a_mistake() -> None:
    """The class is the sign pattern of two of eight features: a probe that does not find it measures itself."""
    x = features(800, 8, seed=0)
    x[:, :2] += 1.5 * x[:, :2].sign()
    y = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    found = probe(x[:400], y[:400], pictures(400), x[400:], y[400:])
    assert found.accuracy == 1.0


def test_noise_is_read_at_chance() -> None:
    """Labels independent of the features: 1 / 4 lies in the interval, although the training items could be learnt by heart."""
    x, y = features(1200, 64, seed=1), torch.randint(0, 4, (1200,), generator=torch.Generator().manual_seed(2))
    found = probe(x[:600], y[:600], pictures(600), x[600:], y[600:])
    correct = found.correct.float().tolist()
    bounds = paired_bootstrap(correct, [0.0] * 600, pictures(600), n_resamples=1000)
    assert bounds.low < 25 < bounds.high and found.l2 in L2


def test_the_scale_and_offset_of_a_feature_do_not_matter() -> None:
    """Keys and values differ in size by an order of magnitude; an L2 penalty on raw features would favour the loud ones."""
    x, y = features(300, 6, seed=3), torch.arange(300) % 3
    x[:, 4] += y
    scaled = x * torch.tensor([1.0, 1e3, 1e-3, 1.0, 10.0, 1.0]) + 7
    one = probe(x[:200], y[:200], pictures(200), x[200:], y[200:])
    other = probe(scaled[:200], y[:200], pictures(200), scaled[200:], y[200:])
    assert abs(one.accuracy - other.accuracy) <= 0.01 and one.accuracy > 0.45


def test_a_constant_feature_is_no_division_by_zero() -> None:
    """The bottleneck's embedding is the same for every picture."""
    x = torch.cat((torch.full((40, 1), 3.0), (torch.arange(40) % 2)[:, None].float()), dim=1)
    assert probe(x[:20], torch.arange(20) % 2, pictures(20), x[20:], torch.arange(20) % 2).accuracy == 1.0
    constant = probe(x[:20, :1], torch.arange(20) % 2, pictures(20), x[20:, :1], torch.arange(20) % 2)
    assert constant.accuracy == 0.5


def test_the_solution_is_where_the_gradient_vanishes() -> None:
    """By hand: x = -1, 1 with classes 0, 1. With w = (-v, v) and no bias, the gradient is 0 at v * l2 = 1 / (1 + e^(2v))."""
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    for strength, found in zip((0.1, 0.01), fit(x, y, 2, l2=(0.1, 0.01)), strict=True):
        v = float(found.weight[0, 1])
        assert v * strength == pytest.approx(1 / (1 + torch.tensor(2 * v).exp().item()), abs=1e-4)
        assert float(found.weight[0, 0]) == pytest.approx(-v, abs=1e-4)


def test_things_of_one_picture_are_held_out_together() -> None:
    """The regularisation would be chosen on pictures that were trained on, and come out too weak."""
    names = pictures(200)
    is_held = held_out(names, seed=4)
    inside = {name for name, held in zip(names, is_held, strict=True) if held}
    outside = {name for name, held in zip(names, is_held, strict=True) if not held}
    assert len(inside) == 20 and not inside & outside
    assert torch.equal(is_held, held_out(names, seed=4)) and not torch.equal(is_held, held_out(names, seed=5))


def test_a_label_that_was_never_trained_is_refused() -> None:
    """It could never be right, and would lower the accuracy without anybody noticing."""
    x, y = features(10, 2, seed=5), torch.arange(10) % 2
    with pytest.raises(ValueError, match=r"\[2\] do not occur in training"):
        probe(x, y, pictures(10), x, y + 1)
    with pytest.raises(ValueError, match="at least two pictures"):
        probe(x, y, ["one"] * 10, x, y)
