"""Finite scalar quantization."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.quantizers.fsq import finite_scalar


def test_each_channel_takes_as_many_values_as_it_has_levels() -> None:
    """The paper's levels (8, 5): an even number of levels is shifted by half a step, and must not lose one."""
    z = torch.linspace(-6, 6, 4001)[:, None].expand(-1, 2)
    code = finite_scalar(z, (8, 5))
    assert code[:, 0].unique().tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert code[:, 1].unique().tolist() == [-1, -0.5, 0, 0.5, 1]


def test_gradients_pass_straight_through_the_rounding() -> None:
    """tanh' at 0 is 1, times half of (5 - 1) * 1.001, divided by 5 // 2: 1.001. A plain round would give 0."""
    z = torch.zeros(1, requires_grad=True)
    finite_scalar(z, (5,)).backward()
    assert z.grad is not None and z.grad.item() == pytest.approx(1.001)


def test_levels_must_fit_the_channels() -> None:
    """Broadcasting would give every channel the levels of one."""
    with pytest.raises(ValueError, match="3 channels and levels"):
        finite_scalar(torch.zeros(3), (8,))
    with pytest.raises(ValueError, match="at least 2"):
        finite_scalar(torch.zeros(1), (1,))
