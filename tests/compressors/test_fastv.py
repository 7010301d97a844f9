"""FastV against its definition, run by hand for one sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import htc_vlm
from htc_vlm import compressors
from htc_vlm.tokens import equivalent_tokens


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize(("layer", "n_keep"), [(1, 3), (2, 5), (5, 1)])
def test_fastv_is_layer_k_minus_1s_last_row_and_positions_are_kept(
    llava: Any, prompts: Any, by_hand: Any, layer: int, n_keep: int, sample: int
) -> None:
    """The lmms fork scores after running layer K-1 twice, and a shifted image start picks the wrong patches. Sample 1 has two
    images: each keeps its own n_keep."""
    ids, pixels = prompts.samples[sample], prompts.pixels[sample]
    states, position = by_hand.embed(llava, ids, pixels), torch.arange(len(ids))
    is_image = by_hand.is_image(ids)
    for index in range(len(llava.model.language_model.layers)):
        if index == layer:
            scores = weights.mean(dim=0)[-1]  # noqa: F821 (of the layer before)
            stay = ~is_image
            for columns in is_image.nonzero().reshape(-1, 16):
                stay[columns[scores[columns].topk(n_keep).indices]] = True
            states, position = states[:, stay], position[stay]
        states, weights = by_hand.run_layer(llava, index, states, position)
    expected = by_hand.finish(llava, states)
    with htc_vlm.apply(llava, "fastv", n_keep=n_keep, layer=layer) as applied:
        logits = llava(**prompts.one(sample)).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert applied.schedule == [16] * layer + [n_keep] * (6 - layer)


def test_fastv_tells_which_patches_it_kept(llava: Any, prompts: Any) -> None:
    """A heatmap drawn from guessed indices would show something else than what the model saw."""
    with htc_vlm.apply(llava, "fastv", n_keep=5, layer=2) as applied:
        llava(**prompts.batch)
    assert applied.source.shape == (4, 5, 16)
    assert torch.equal(applied.source.sum(dim=-1), torch.ones(4, 5))
    kept = applied.source.argmax(dim=-1)
    assert bool((kept[:, 1:] > kept[:, :-1]).all())


@pytest.mark.parametrize(("budget", "n_keep"), [(192, 166), (128, 98), (64, 30)])
def test_fastvs_published_budgets_are_means_over_layers(budget: int, n_keep: int) -> None:
    """docs/specs/baselines.md section 5: keeping literally 192 after layer 2 would cost a mean of 216."""
    schedule = compressors.build("fastv", n_keep=n_keep, layer=2).schedule(576, 32)
    assert schedule == [576] * 2 + [n_keep] * 30
    assert abs(equivalent_tokens(schedule) - budget) < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_keep": 577}, "only 576"),
        ({"layer": 32}, "between 1 and 31"),
        ({"layer": 0}, "at least 1"),
        ({"n_keep": 0}, "at least 1"),
    ],
)
def test_fastv_refuses_what_a_7b_model_cannot_do(settings: dict[str, int], message: str) -> None:
    """The released code clips the number of tokens and fails inside a tensor operation for the layer."""
    with pytest.raises(ValueError, match=message):
        compressors.build("fastv", **settings).schedule(576, 32)
