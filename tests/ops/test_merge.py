"""ToMe's matching against the official outputs; merge lists against the specification; VisionZip's merge by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from htc_vlm.ops.merge import (
    TokenMerge,
    bipartite_soft_matching,
    contextual_merge,
    halving_list,
    merge_list,
    patches_after,
)


@pytest.mark.parametrize(("name", "r", "class_token"), [("tome_r5", 5, False), ("tome_cls_r4", 4, True)])
def test_matching_equals_the_official_one(golden: Path, name: str, r: int, class_token: bool) -> None:
    """Ports lose the sizes between layers (LightCompress) or the order of what is kept."""
    official = load_file(golden / f"{name}.safetensors")
    matching = bipartite_soft_matching(official["metric"], r, class_token=class_token)
    x, size = matching.merge(official["x"], official["size"])
    torch.testing.assert_close(x, official["merged"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(size, official["merged_size"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matching.source, official["provenance"])


def test_the_class_token_is_never_merged() -> None:
    """The class token is the token most like everything else; merging it away loses VisionZip's and LLaVA's row 0."""
    metric = torch.ones(1, 9, 4)
    matching = bipartite_soft_matching(metric, 4, class_token=True)
    assert matching.source[0, 0].tolist() == [1] + [0] * 8


def test_every_token_goes_somewhere_and_sizes_add_up() -> None:
    """A token that goes nowhere, or twice, changes the total weight of the picture."""
    generator = torch.Generator().manual_seed(0)
    matching = bipartite_soft_matching(torch.randn(2, 15, 4, generator=generator), 6)
    assert matching.source.shape == (2, 9, 15)
    assert torch.equal(matching.source.sum(dim=1), torch.ones(2, 15))
    _, size = matching.merge(torch.randn(2, 15, 3, generator=generator))
    assert size.sum(dim=1).flatten().tolist() == [15.0, 15.0]


def test_equal_similarities_merge_the_first_tokens() -> None:
    """The official argsort is unstable: ties differ between devices and between a batch and its samples."""
    matching = bipartite_soft_matching(torch.ones(1, 6, 2), 1)
    assert matching.destination.tolist() == [[2, 2, 0, 3, 1, 4]]


def test_merging_nothing_changes_nothing() -> None:
    """r = 0 must be the identity, not the even and odd tokens apart."""
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    merged, size = bipartite_soft_matching(x, 0).merge(x)
    assert torch.equal(merged, x) and size.flatten().tolist() == [1.0] * 5


@pytest.mark.parametrize(("n", "r", "class_token"), [(6, 4, False), (7, 4, True), (6, -1, False), (8, 4, True)])
def test_merging_more_than_half_is_refused(n: int, r: int, class_token: bool) -> None:
    """The official code merges fewer without a word, and the budget in the table is then another one."""
    with pytest.raises(ValueError, match=f"r={r} of {n} tokens"):
        bipartite_soft_matching(torch.ones(1, n, 2), r, class_token=class_token)


def test_two_merges_as_one_keep_their_provenance() -> None:
    """The picture of which patch went where needs all blocks, not the last."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 4, generator=generator)
    first = bipartite_soft_matching(x, 5)
    halfway, size = first.merge(x)
    second = bipartite_soft_matching(halfway, 4)
    expected, expected_size = second.merge(halfway, size)
    both = first.then(second)
    merged, merged_size = both.merge(x)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(merged_size, expected_size)
    torch.testing.assert_close(both.source, second.source @ first.source)
    with pytest.raises(ValueError, match="leaves 11 tokens, the second takes 16"):
        first.then(first)


def test_raster_order_sorts_the_groups_and_keeps_them() -> None:
    """Scrambled groups lose the order of the picture in the positions of the language model."""
    merge = TokenMerge(torch.tensor([[2, 1, 2, 0], [0, 1, 2, 0]]), n_out=3).in_raster_order()
    assert merge.destination.tolist() == [[0, 1, 0, 2], [0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("n_keep", "merges"),
    [(192, [16] * 7 + [17] * 16), (128, [19] * 12 + [20] * 11), (64, [22] * 17 + [23] * 6)],
)
def test_merge_lists_give_the_published_budgets_exactly(n_keep: int, merges: list[int]) -> None:
    """A constant r gives 208, 185, 139, 116, 70 or 47 tokens, none of the budgets (docs/specs/baselines.md, section 4)."""
    assert merge_list(576, n_keep, 23) == merges
    assert patches_after(576, merges) == n_keep


@pytest.mark.parametrize(("n_patches", "n_keep", "n_blocks"), [(100, 11, 4), (100, 33, 3), (576, 1, 12), (9, 9, 2)])
def test_every_merge_list_can_be_carried_out(n_patches: int, n_keep: int, n_blocks: int) -> None:
    """An even list asks the last block for more than half of what is left."""
    merges = merge_list(n_patches, n_keep, n_blocks)
    assert len(merges) == n_blocks and patches_after(n_patches, merges) == n_keep
    x = torch.randn(1, n_patches + 1, 2, generator=torch.Generator().manual_seed(0))
    for r in merges:
        x, _ = bipartite_soft_matching(x, r, class_token=True).merge(x)
    assert x.shape[1] == n_keep + 1


def test_merge_lists_that_cannot_be_met_are_refused() -> None:
    """Two blocks at most quarter the tokens: 100 -> 25."""
    with pytest.raises(ValueError, match="n_keep must be at least 25"):
        merge_list(100, 24, 2)
    with pytest.raises(ValueError, match="n_keep=101 of 100"):
        merge_list(100, 101, 2)
    with pytest.raises(ValueError, match="block 1 is asked to merge 30 of 50 patches"):
        patches_after(100, [50, 30])


def test_merging_after_the_tower_halves() -> None:
    """576 -> 288 -> 192 (docs/specs/baselines.md, section 4)."""
    assert halving_list(576, 192) == [288, 96]
    assert halving_list(576, 64) == [288, 144, 72, 8]
    assert halving_list(576, 576) == []


def test_contextual_tokens_are_the_target_plus_the_mean_of_those_who_joined() -> None:
    """The paper says average; the released checkpoints and numbers are of the sum (docs/specs/baselines.md, section 9)."""
    x = torch.tensor([[[1.0], [10.0], [20.0], [4.0], [7.0]]])
    metric = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [3.0, 0.2], [0.0, 1.0], [0.1, 2.0]]])
    merged = contextual_merge(x, metric, 2)  # targets 0 and 2 of 5; step 2
    assert merged.source[0].tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 1, 1]]
    assert merged.tokens.flatten().tolist() == [1.0, 27.0]  # 20 + (10 + 4 + 7) / 3
    half = contextual_merge(x.bfloat16(), metric.bfloat16(), 2)
    assert half.tokens.dtype == torch.bfloat16 and half.tokens.flatten().tolist() == [1.0, 27.0]


def test_contextual_tokens_beyond_what_is_left_are_refused() -> None:
    """54 + 10 of 60 patches cannot be met."""
    x = torch.zeros(1, 6, 2)
    assert contextual_merge(x, x, 0).tokens.shape == (1, 0, 2)
    assert contextual_merge(x, x, 6).tokens.shape == (1, 6, 2)
    with pytest.raises(ValueError, match="n_contextual=10 tokens from the 6"):
        contextual_merge(x, x, 10)
