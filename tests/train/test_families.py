"""`htc-vlm train` on a family beyond LLaVA: its bottleneck learns from conversations about pictures of several sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from htc_vlm import load
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.answering import Answerer
from htc_vlm.train import setup

from .. import stock_families

SIZES = [(40, 30), (30, 90), (64, 64)]
QUICK = ("qwen3_vl",)


def data(folder: Path) -> list[dict[str, str]]:
    """Three pictures of three sizes, the last beside the first, and a conversation without any."""
    samples: list[dict[str, object]] = []
    for i, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{i}.png")
        images = [f"{i}.png"] if i < 2 else [f"{i}.png", "0.png"]
        asked = "<image>\n" * len(images) + "what is at the top left ?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "red house"}]
        samples.append({"id": str(i), "image": images, "conversations": turns})
    turns = [{"from": "human", "value": "what is red ?"}, {"from": "gpt", "value": "house"}]
    (folder / "data.json").write_text(json.dumps([*samples, {"id": "t", "conversations": turns}]))
    return [{"task": "mine", "json": str(folder / "data.json")}]


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in stock_families.PROCESSORS]
)
def test_two_steps_train_the_bottleneck_of_a_family(family: str, tmp_path: Path) -> None:
    """Pictures of several sizes in one batch, parameters under the family's names, a model that is saved to be asked."""
    start = stock_families.save(family, tmp_path / "start")
    block = {"steps": 2, "images_per_step": 4, "learning_rate": 0.01, "warmup_steps": 0, "compressor": {"name": "voco"}}
    preset = {"name": "p", "data": data(tmp_path), "stages": {"compress": block}}
    given = {"start": str(start), "device": "cpu"}
    with pytest.raises(ValueError, match="answers_only computes no logits .* does not go with a "):
        refused = {**preset, "stages": {"compress": {**block, "answers_only": True}}}
        setup.train_stage(refused, "compress", tmp_path / "refused", **given)
    assert not (tmp_path / "refused").exists()
    report = setup.train_stage(preset, "compress", tmp_path / "out", **given)
    assert report["steps"] == 2
    model, processor = load(tmp_path / "out" / "model")
    before, _ = with_compressor(start, {"name": "voco"}, dtype=torch.float32)
    new = model.config.bottleneck_token_id
    rows = [one.get_input_embeddings().weight[new].float() for one in (model, before)]
    # Adam's first step is the learning rate; rounding to bfloat16 when saved is below 0.002 of these weights
    assert (rows[0] - rows[1]).abs().max() > 5e-3, "the bottleneck token's embedding must have learnt"
    answerer = Answerer(model, processor)
    kept = answerer.encode([Image.open(tmp_path / f"{i}.png").convert("RGB") for i in range(2)])
    assert len(answerer.ask(kept, [0, 1], ["what is red ?"] * 2, 2)) == 2
