"""PyramidDrop against its definition, run by hand for one sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import htc_vlm
from htc_vlm import compressors
from htc_vlm.tokens import equivalent_tokens


def test_pyramid_drop_scores_with_the_next_layer_and_renumbers(llava: Any, prompts: Any, by_hand: Any) -> None:
    """The paper says the stage's last layer scores, the code uses the next one's queries and keys, before it runs."""
    ids, pixels = prompts.samples[0], prompts.pixels[0]
    states, is_image = by_hand.embed(llava, ids, pixels), by_hand.is_image(ids)
    keep = {1: 8, 3: 4, 5: 2}
    for index in range(6):
        position = torch.arange(states.shape[1])
        if index in keep:
            _, weights = by_hand.run_layer(llava, index, states, position)  # positions before the cut
            scores = weights.mean(dim=0)[-1].masked_fill(~is_image, -1)
            stay = ~is_image
            stay[scores.topk(keep[index]).indices] = True
            states, is_image = states[:, stay], is_image[stay]
            position = torch.arange(states.shape[1])
        states, _ = by_hand.run_layer(llava, index, states, position)
    expected = by_hand.finish(llava, states)
    with htc_vlm.apply(llava, "pyramid_drop", stages=(1, 3, 5), ratio=0.5) as applied:
        logits = llava(**prompts.one(0)).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert applied.schedule == [16, 8, 8, 4, 4, 2]


@pytest.mark.parametrize(
    ("stages", "ratio", "kept", "mean"),
    [
        ((8, 16, 24), 0.5, (288, 144, 72), 270.0),  # the paper's own setting
        ((2, 8, 16), 0.5606, (322, 181, 101), 192.1),
        ((2, 8, 16), 0.4211, (242, 102, 43), 128.4),
        ((2, 8, 16), 0.1927, (110, 21, 4), 63.9),
        ((8, 16, 24), (0.5, 0.25, 0.125), (288, 144, 72), 270.0),
    ],
)
def test_pyramid_drops_budgets(stages: tuple[int, ...], ratio: Any, kept: tuple[int, ...], mean: float) -> None:
    """int(), not round(): docs/specs/baselines.md section 6."""
    schedule = compressors.build("pyramid_drop", stages=stages, ratio=ratio).schedule(576, 32)
    assert tuple(schedule[stage] for stage in stages) == kept
    assert equivalent_tokens(schedule) == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": (8, 16, 32)}, "between 1 and 31"),
        ({"stages": (16, 8)}, "increasing"),
        ({"stages": (8, 16), "ratio": (0.5,)}, "2 stages need as many ratios"),
        ({"ratio": 1.5}, "at most 1"),
        ({"ratio": 0.01}, "cannot keep 0"),
    ],
)
def test_pyramid_drop_refuses_impossible_stages(settings: dict[str, Any], message: str) -> None:
    """The released code indexes layers[32] and dies."""
    with pytest.raises(ValueError, match=message):
        compressors.build("pyramid_drop", **settings).schedule(576, 32)
