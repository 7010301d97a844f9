"""What is trained and what is frozen, and that the table printed says so."""

from __future__ import annotations

import pytest
import torch

from htc_vlm.train.stages import ALWAYS_FROZEN, STAGES, freeze, trainable_table

from .. import tiny_runs as tiny


def counts(model: torch.nn.Module) -> dict[bool, int]:
    """requires_grad -> number of values."""
    out = {True: 0, False: 0}
    for parameter in model.parameters():
        out[parameter.requires_grad] += parameter.numel()
    return out


@pytest.fixture
def model() -> torch.nn.Module:
    from htc_vlm import load

    return load(tiny.checkpoint(tiny.HTC))[0]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_table_says_what_requires_grad(stage: str, model: torch.nn.Module) -> None:
    """A table from another source than requires_grad would calm the reader while the tower is being trained."""
    table = trainable_table(freeze(model, STAGES[stage].trains)).splitlines()[1:]
    trainable, frozen = (sum(int(row.split()[column].replace(",", "")) for row in table) for column in (1, 2))
    assert {True: trainable, False: frozen} == counts(model)
    rows = {row.split()[0]: int(row.split()[1].replace(",", "")) > 0 for row in table}
    assert rows["multi_modal_projector"]
    assert rows["language_model"] == (stage != "align")
    assert rows["compressor.to_anchors"] == (stage == "compress")
    assert not rows["vision_tower"] and not rows["compressor.quantizer"]


def test_the_tower_and_the_quantizer_never_learn_whatever_a_preset_names(model: torch.nn.Module) -> None:
    """`trains: [model.]` names everything; codes and cached features would no longer be those of the model."""
    freeze(model, ("model.",))
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and not any(name.startswith(ALWAYS_FROZEN) for name in learning)


def test_the_bottleneck_embedding_learns_in_the_compress_stage(model: torch.nn.Module) -> None:
    """It is a row of the embedding: frozen with it, the bottleneck would ask what a random vector asks."""
    freeze(model, STAGES["compress"].trains)
    processor = tiny.loaded(tiny.HTC)[1]
    ids = processor.tokenizer(processor.image_text() + tiny.QUESTIONS[0], return_tensors="pt")["input_ids"]
    pixels = processor(images=[tiny.noise(0)], return_tensors="pt")["pixel_values"]
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    row = model.get_input_embeddings().weight.grad[model.config.bottleneck_token_id]
    assert row.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())


def test_a_stage_that_trains_nothing_is_refused(model: torch.nn.Module) -> None:
    """A mistyped prefix would train for hours and change no weight."""
    with pytest.raises(ValueError, match="nothing would be trained.*model.projektor"):
        freeze(model, ("model.projektor.",))
