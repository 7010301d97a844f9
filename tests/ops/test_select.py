"""Selection by score, diversity and chance, and packing of ragged batches: all by hand."""

from __future__ import annotations

import math

import pytest
import torch

from htc_vlm.ops.select import gather_tokens, keep_diverse, keep_random, keep_top, pack_left_padded


def test_the_highest_scores_stay_in_their_order() -> None:
    """topk returns by score: the kept tokens would change places."""
    assert keep_top(torch.tensor([[0.3, 0.1, 0.9, 0.2], [4.0, 3.0, 2.0, 1.0]]), 2).tolist() == [[0, 2], [0, 1]]


def test_among_equals_the_lowest_index_stays() -> None:
    """torch.topk leaves ties open: another device, another answer."""
    scores = torch.zeros(1, 5000)
    scores[0, 4321] = 1
    assert keep_top(scores, 4).tolist() == [[0, 1, 2, 4321]]


@pytest.mark.parametrize("n_keep", [0, 6])
def test_a_number_that_cannot_be_kept_is_refused(n_keep: int) -> None:
    """Slicing clips without a word."""
    with pytest.raises(ValueError, match=f"n_keep={n_keep} of 5"):
        keep_top(torch.zeros(1, 5), n_keep)
    with pytest.raises(ValueError, match=f"n_keep={n_keep} of 5"):
        keep_diverse(torch.zeros(1, 5, 2), n_keep)
    with pytest.raises(ValueError, match=f"n_keep={n_keep} of 5"):
        keep_random(5, n_keep, seed=0)


def test_diverse_tokens_are_picked_farthest_first() -> None:
    """Directions at 0, 10, 90, 100 and 185 degrees: 185 is loneliest, and 10 is farthest from it (175 away)."""
    angles = [math.radians(degrees) for degrees in (0, 10, 90, 100, 185)]
    x = torch.tensor([[[math.cos(angle), math.sin(angle)] for angle in angles]])
    assert keep_diverse(x, 1).tolist() == [[4]]
    assert keep_diverse(x, 2).tolist() == [[1, 4]]
    assert keep_diverse(x, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_the_third_is_the_one_farthest_from_both() -> None:
    """Maximum of the minimum distance, not of the sum: 90 is 80 from 10 and 95 from 185; 100 is 90 and 85."""
    angles = [math.radians(degrees) for degrees in (0, 10, 90, 100, 185)]
    x = torch.tensor([[[math.cos(angle), math.sin(angle)] for angle in angles]])
    assert keep_diverse(x, 3).tolist() == [[1, 3, 4]]


def test_length_does_not_count_as_diversity() -> None:
    """The distance is the cosine's."""
    x = torch.tensor([[[1.0, 0.0], [100.0, 1.0], [0.0, 1.0]]])
    assert keep_diverse(x, 2).tolist() == keep_diverse(x * torch.tensor([5.0, 0.1, 3.0]).view(1, 3, 1), 2).tolist()


def test_identical_patches_are_still_kept_once_each() -> None:
    """The released DivPrune can pick one index twice, and then keeps fewer tokens than it says."""
    assert keep_diverse(torch.ones(2, 6, 3), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_diversity_of_a_batch_is_that_of_its_samples() -> None:
    """CDPruner's port normalises over the whole batch."""
    x = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([keep_diverse(sample[None], 7) for sample in x])
    assert torch.equal(keep_diverse(x, 7), alone)


def test_random_indices_come_from_their_own_seed() -> None:
    """A draw from the global state makes the next layer's dropout another one."""
    state = torch.get_rng_state()
    kept = keep_random(100, 10, seed=1)
    assert torch.equal(kept, keep_random(100, 10, seed=1))
    assert not torch.equal(kept, keep_random(100, 10, seed=2))
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert torch.equal(state, torch.get_rng_state())


def test_kept_columns_are_flush_right_and_in_order() -> None:
    """Right padding after dropping breaks generation: the last column must be the last token of every sample."""
    is_kept = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 1], [1, 1, 1, 0, 1]]).bool()
    packed = pack_left_padded(is_kept)
    assert packed.is_real.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    old = [row[real].tolist() for row, real in zip(packed.index, packed.is_real, strict=True)]
    assert old == [[0, 3, 4], [2, 4], [0, 1, 2, 4]]
    states = torch.arange(15).view(3, 5, 1)
    assert gather_tokens(states, packed.index)[..., 0][packed.is_real].tolist() == [0, 3, 4, 7, 9, 10, 11, 12, 14]


def test_keeping_everything_is_the_identity() -> None:
    """The mildest setting must be bit-identical to no method."""
    packed = pack_left_padded(torch.ones(2, 4, dtype=torch.bool))
    assert packed.index.tolist() == [[0, 1, 2, 3]] * 2 and bool(packed.is_real.all())
    with pytest.raises(ValueError, match="keep at least one token"):
        pack_left_padded(torch.zeros(2, 4, dtype=torch.bool))


def test_tokens_of_any_width_are_gathered() -> None:
    """Flags are (B, N), states (B, N, D), keys (B, N, H, head_dim)."""
    index = torch.tensor([[2, 0]])
    assert gather_tokens(torch.tensor([[5, 6, 7]]), index).tolist() == [[7, 5]]
    assert gather_tokens(torch.arange(12).view(1, 3, 2, 2), index).flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
