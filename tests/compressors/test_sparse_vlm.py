"""SparseVLM against its definition, run by hand for one sample; its raters and its recycling by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import htc_vlm
from htc_vlm import compressors
from htc_vlm.compressors.sparse_vlm import corrected_scores, raters, recycle
from htc_vlm.ops.cluster import dpc_knn_merge
from htc_vlm.ops.schedules import leaving
from htc_vlm.tokens import TokenLayout, equivalent_tokens


def raters_by_hand(states: Tensor, is_image: Tensor) -> Tensor:
    """(N,) bool: text after the image above the mean of the patches' softmax over it."""
    after = torch.arange(len(is_image)) > int(is_image.nonzero().max())
    share = (states[0, is_image] @ states[0, after].T).softmax(dim=-1).mean(dim=0)
    chosen = torch.zeros_like(is_image)
    chosen[after.nonzero().squeeze(1)[share > share.mean()]] = True
    return chosen


@pytest.mark.parametrize("plus", [False, True])
def test_sparse_vlm_drops_at_the_output_of_its_layers(llava: Any, prompts: Any, by_hand: Any, plus: bool) -> None:
    """Off by one layer is 10 % of the tokens; recycled tokens stand after the kept patches, before the text."""
    ids, pixels = prompts.samples[2], prompts.pixels[2]
    states, is_image = by_hand.embed(llava, ids, pixels), by_hand.is_image(ids)
    is_rater = raters_by_hand(states, is_image)
    position = torch.arange(len(ids))
    n_heads = 2  # of 4
    for index in range(6):
        states, weights = by_hand.run_layer(llava, index, states, position)
        if index not in (1, 3):
            continue
        n_keep = {1: 7, 3: 3}[index]
        if plus:
            width = llava.model.language_model.layers[0].self_attn.head_dim
            theta = 10000.0 ** (-torch.arange(0, width, 2) / width)
            angle = (position[:, None] - position[None, :])[..., None] * theta
            weights = weights / (2 * angle.cos().sum(dim=-1) / math.sqrt(width))
        by_head = weights[:, is_rater].mean(dim=1)  # (H, N)
        if plus:  # the best heads, by what is left after the correction
            by_head = by_head[by_head[:, is_image].sum(dim=1).topk(n_heads).indices]
        scores = by_head.mean(dim=0).masked_fill(~is_image, -torch.inf)
        kept = scores.topk(n_keep).indices.sort().values
        first, last = int(is_image.nonzero().min()), int(is_image.nonzero().max())
        if plus:
            middle, at = states[:, kept], position[kept]
            position = torch.cat((position[:first], at, position[last + 1 :]))
        else:
            rest = scores.clone()
            rest[kept] = -torch.inf
            n_dropped = int(is_image.sum()) - n_keep
            best = rest.topk(int(0.3 * n_dropped) + 1).indices
            means = dpc_knn_merge(states[:, best], (int(0.3 * n_dropped) + 1) // 10 + 1)
            middle = torch.cat((states[:, kept], means), dim=1)
            position = torch.arange(first + middle.shape[1] + len(is_image) - last - 1)
        states = torch.cat((states[:, :first], middle, states[:, last + 1 :]), dim=1)
        is_rater = torch.cat((is_rater[:first], torch.zeros(middle.shape[1]).bool(), is_rater[last + 1 :]))
        is_image = torch.cat((is_image[:first], torch.ones(middle.shape[1]).bool(), is_image[last + 1 :]))
    expected = by_hand.finish(llava, states)
    settings = {"layers": (1, 3), "keep": (7, 3), "plus": plus, "n_heads": n_heads, "noise_seed": None}
    with htc_vlm.apply(llava, "sparse_vlm", **settings) as applied:
        logits = llava(**prompts.one(2)).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert applied.schedule == ([16, 16, 7, 7, 3, 3] if plus else [16, 16, 8, 8, 4, 4])


def test_raters_are_chosen_per_sample_and_not_among_padding() -> None:
    """The official code mixes the samples of a batch; a padded token like the image must not rate it."""
    image, like, unlike = [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]
    rows = torch.tensor([[like, image, like, unlike, unlike], [image, image, unlike, like, like]])
    layout = TokenLayout.from_string("pvttt", "vvttp")
    assert raters(rows, layout).int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]


def test_a_single_word_rates_alone() -> None:
    """Nobody is above the mean of one; the official code takes the mean of no rows, which is nan."""
    assert raters(torch.ones(1, 3, 2), TokenLayout.from_string("vvt")).int().tolist() == [[0, 0, 1]]


def test_no_text_after_the_image_is_refused() -> None:
    """Nobody could rate."""
    with pytest.raises(ValueError, match="text after the last image"):
        raters(torch.ones(1, 3, 2), TokenLayout.from_string("tvv"))


def test_recycled_tokens_are_means_of_the_best_dropped_ones() -> None:
    """Weights must sum to 1: the paper sums clusters, the released code averages them."""
    scores = torch.linspace(1, 0, 50)[None]
    states = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    weights = recycle(scores, states, n_keep=10, noise_seed=0)  # 40 dropped, 13 of them clustered into 2
    assert weights.shape == (1, 12, 50)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 12))
    assert torch.equal(weights[0, :10, :10], torch.eye(10))
    assert bool((weights[0, 10:].sum(dim=0)[10:23] > 0).all())
    assert float(weights[0, :, 23:].abs().sum()) == 0


def test_plus_takes_its_best_heads_only() -> None:
    """Head 1 gives the image most; head 0 must not vote."""
    attention = torch.tensor([[[[0.1, 0.0]], [[0.2, 0.5]]]])  # (I=1, H=2, R=1, n=2)
    seen = compressors.AttentionView(
        n_patches=2,
        attention=attention,
        is_row=torch.ones(1, 1, dtype=torch.bool),
        states=torch.zeros(1, 2, 4),
        distance=torch.zeros(1, 1, 2, dtype=torch.long),
        inv_freq=torch.ones(2),
    )
    scores = corrected_scores(seen, n_heads=1)  # decay at distance 0: 2 * 2 cosines of 0 over the root of 4, so 2
    assert scores.flatten().tolist() == pytest.approx([0.1, 0.25])
    with pytest.raises(ValueError, match="the model has 2"):
        corrected_scores(seen, n_heads=3)


@pytest.mark.parametrize(
    ("budget", "plus", "stages", "mean", "authors_mean"),
    [
        (192, False, (309, 204, 113), 206.5, 192.0),
        (128, False, (312, 117, 39), 145.4, 128.6),
        (64, False, (82, 32, 18), 82.3, 64.8),
        (192, True, (300, 200, 118), 206.8, 192.4),
        (128, True, (238, 108, 60), 144.1, 128.0),
        (64, True, (66, 34, 20), 81.8, 64.4),
    ],
)
def test_sparse_vlms_budgets_both_ways_of_counting(
    budget: int, plus: bool, stages: tuple[int, ...], mean: float, authors_mean: float
) -> None:
    """docs/specs/baselines.md section 7: the authors count what leaves a layer, so their 64 is 82."""
    schedule = compressors.build("sparse_vlm", budget=budget, plus=plus).schedule(576, 32)
    assert (schedule[3], schedule[7], schedule[16]) == stages
    assert schedule[:3] == [576] * 3
    assert equivalent_tokens(schedule) == pytest.approx(mean, abs=0.06)
    assert equivalent_tokens(leaving(schedule)) == pytest.approx(authors_mean, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 100}, "known: 192, 128, 96, 64"),
        ({"layers": (1, 2)}, "go together"),
        ({"budget": 64, "layers": (1,), "keep": (4,)}, "excludes"),
        ({"layers": (31,), "keep": (4,)}, "between 1 and 31"),
        ({"layers": (1,), "keep": (577,)}, "give 1 to 576"),
        ({"layers": (1, 2), "keep": (4,)}, "equally long"),
    ],
)
def test_sparse_vlm_refuses_tables_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    """An unknown budget must not fall back to a neighbour."""
    with pytest.raises(ValueError, match=message):
        compressors.build("sparse_vlm", **settings).schedule(576, 32)


def test_the_published_tables_are_refused_for_other_models() -> None:
    """300 of 100 patches."""
    with pytest.raises(ValueError, match="give layers and keep"):
        compressors.build("sparse_vlm", budget=64).schedule(100, 8)
