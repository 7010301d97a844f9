"""`htc_vlm.apply` measures what its block did, and leaves the model as it was, also when the block dies half-way."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from .applying import N_NEW, answer, applied, every, inside, traces


@pytest.mark.parametrize("fails", [False, True])
@every
def test_afterwards_the_model_is_bit_identical(llavas: Any, prompts: Any, case: str, fails: bool) -> None:
    """Monkeypatches outlive their experiment; here also when it dies half-way."""
    model = llavas["sdpa"]
    plain = answer(model, prompts.batch)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = traces(model)
    random_state = torch.get_rng_state()
    try:
        with applied(model, case):
            answer(model, prompts.batch)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(random_state, torch.get_rng_state())
    assert traces(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = answer(model, prompts.batch)
    assert torch.equal(plain.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits, strict=True))


@every
def test_an_exception_in_the_middle_of_a_layer_leaves_nothing(new_llava: Any, prompts: Any, case: str) -> None:
    """Out of memory comes there, on a model that has answered nothing yet; then a smaller batch is tried."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    model, stock = new_llava(), new_llava()
    for tried, block in ((model, applied(model, case)), (stock, nullcontext())):
        layer = tried.model.language_model.layers[3]
        layer.forward = fail
        with pytest.raises(MemoryError), block:
            tried(**prompts.batch)
        del layer.forward
    assert traces(model) == traces(stock)  # transformers' own hooks, which its first call adds, included
    assert torch.equal(model(**prompts.batch).logits, stock(**prompts.batch).logits)


@every
def test_the_measured_schedule_is_the_promise(llava: Any, prompts: Any, case: str) -> None:
    """Published budgets were compared by promise only; SparseVLM's 64 is 82."""
    with applied(llava, case) as run:
        assert run.schedule is None
        out = answer(llava, prompts.one(0))
    assert run.schedule == run.method.schedule(16, 6)
    n_text = len(prompts.samples[0]) - 16 + N_NEW - 1
    assert [layer.keys.shape[2] - n_text for layer in out.past_key_values.layers] == run.schedule


def test_a_broken_promise_is_an_error(llava: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule in a table that no run had."""
    from htc_vlm.compressors.fastv import FastV

    monkeypatch.setattr(FastV, "schedule", lambda *_: [16, 16, 4, 4, 4, 4])
    with applied(llava, "fastv"), pytest.raises(ValueError, match=r"promised the schedule \[16, 16, 4"):
        llava(**prompts.batch)
    from htc_vlm.compressors.divprune import DivPrune

    monkeypatch.setattr(DivPrune, "before_llm", lambda _, images: images.patches[:, :7])
    with applied(llava, "divprune"), pytest.raises(ValueError, match="divprune promised 6 visual tokens and gave 7"):
        llava(**prompts.batch)


@inside
def test_asking_for_attention_maps_changes_nothing(llava: Any, prompts: Any, case: str) -> None:
    """Maps of later layers are smaller, and the answer the same."""
    with applied(llava, case) as run:
        plain = llava(**prompts.one(0)).logits
        asked = llava(**prompts.one(0), output_attentions=True, output_hidden_states=True)
    assert torch.equal(plain, asked.logits)
    n_text = len(prompts.samples[0]) - 16
    assert [maps.shape[-1] - n_text for maps in asked.attentions] == run.schedule
    assert [states.shape[1] - n_text for states in asked.hidden_states[1:]] == run.schedule
