"""Packing keys and values into 8, 4 and 2 bits, by hand."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.model.packing import Levels, Packed, pack

SHAPE = (2, 2, 3, 1, 4)  # layers, 2, kv heads, K, head_dim


def random(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_int4_is_a_scale_and_fifteen_steps_a_head() -> None:
    """By hand: the scale is 14 / 7 = 2; 14, -3.1, 1.1, 0 become 7, -2 (-1.55 rounds away), 1 and 0 steps, 8 added."""
    kv = torch.tensor([14.0, -3.1, 1.1, 0.0]).expand(1, 1, 2, 1, 1, 4)
    packed = pack(kv, "int4")
    assert packed.rows.shape == (1, 4 + 4)
    assert packed.rows[0, :2].tolist() == [15 | (6 << 4), 9 | (8 << 4)]
    assert packed.rows[0, 4:].view(torch.float16).tolist() == [2.0, 2.0]
    assert packed.unpack()[0, 0, 0, 0, 0].tolist() == [14.0, -4.0, 2.0, 0.0]


@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127), ("int4", 7)])
def test_no_value_moves_by_more_than_half_a_step(dtype: str, steps: int) -> None:
    kv = random(20)
    step = kv.abs().amax(-1, keepdim=True) / steps
    assert ((pack(kv, dtype).unpack() - kv).abs() <= 0.5 * step * (1 + 2e-2)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packing_again_changes_nothing(dtype: str) -> None:
    """A store that is merged or written from a packed album must not drift."""
    once = pack(random(20), dtype)
    assert pack(once.unpack(), dtype).rows.equal(once.rows)


def test_a_head_of_zeros_stays_zero() -> None:
    """A scale of zero, divided by."""
    assert pack(torch.zeros(1, *SHAPE), "int4").unpack().equal(torch.zeros(1, *SHAPE))


def test_levels_find_four_clusters_of_each_number() -> None:
    """Each number of 80 images takes one of four values: these are the levels, and nothing is lost."""
    values = torch.tensor([-3.0, -1.0, 0.5, 4.0])
    codes = torch.arange(80)[:, None].expand(80, 48).add(torch.arange(48)) % 4
    kv = values[codes].reshape(80, *SHAPE)
    levels = Levels.fit(kv)
    assert levels.values.float().flatten(0, -2).allclose(values.expand(48, 4), atol=1e-3)
    packed = pack(kv, "int2", levels)
    assert packed.rows.shape == (80, 12) and packed.unpack().equal(kv)


def test_what_cannot_be_packed_is_refused() -> None:
    kv = random(2)
    with pytest.raises(ValueError, match="int2 needs 64 images or more.*got 2"):
        Levels.fit(kv)
    with pytest.raises(ValueError, match="int2 needs calibrated levels"):
        pack(kv, "int2")
    with pytest.raises(ValueError, match="dtype is 'int3'; known: model, int8, int4, int2"):
        pack(kv, "int3")
    with pytest.raises(ValueError, match="not finite"):
        pack(kv / 0, "int4")
    with pytest.raises(ValueError, match="levels are for images of"):
        pack(kv[:, :1], "int2", Levels(torch.zeros(*SHAPE, 4, dtype=torch.float16)))
    with pytest.raises(ValueError, match="take 48 each"):
        Packed("int4", torch.zeros(1, 7, dtype=torch.uint8), SHAPE)
