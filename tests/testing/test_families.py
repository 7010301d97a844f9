"""The tiny models of `htc_vlm.testing`: made alike each time, and their batches mean what their rows mean."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.testing import tiny_inputs, tiny_model
from htc_vlm.testing.families import FAMILIES

every = pytest.mark.parametrize("family", FAMILIES)


@every
@torch.no_grad()
def test_a_batch_of_ragged_pictures_is_what_stock_transformers_takes(family: str) -> None:
    """Prompts with the wrong number of placeholders, or rows that disagree with their pictures, would test nothing."""
    model, one = tiny_model(family)
    batch = tiny_inputs(family, [[0], [], [1], [2, 0]])
    logits = model(**batch).logits
    alone = model(**one).logits[0, -1]
    torch.testing.assert_close(logits[0, -1], alone, atol=1e-4, rtol=0)
    other = model(**{**one, "pixel_values": one["pixel_values"].flip(-1)}).logits[0, -1]
    assert (other - alone).abs().max() > 0.1  # the picture matters


def test_models_are_made_alike_and_leave_the_random_state_alone() -> None:
    """Seeds that leak make tests depend on their order."""
    before = torch.get_rng_state()
    first, second = (tiny_model("llava")[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown family 'llama'; known: llava, llava_next"):
        tiny_model("llama")
