"""LLaVA-Mini and its ablation train like the other methods: on packed questions, and are asked afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from htc_vlm import load
from htc_vlm.cli import train
from htc_vlm.model.answering import Answerer

from .. import tiny_runs as tiny


@pytest.mark.parametrize(("n_fusion", "place"), [(2, "before_projector"), (0, "after_projector")])
def test_the_compress_stage_trains_it_on_packed_questions(n_fusion: int, place: str, tmp_path: Path) -> None:
    """Every weight of its own learns, the checkpoint loads, and pictures are answered about in a batch as alone."""
    compressor = {"name": "llava_mini", "n_fusion": n_fusion, "place": place}
    preset = tiny.write_preset(tmp_path, compress={"compressor": compressor})
    assert train.run(tiny.train_arguments(preset, "compress", tmp_path / "run")[:-2]) == 0
    first, last = (load_file(tmp_path / "run" / f"checkpoint-{i}" / "model.safetensors") for i in (2, 4))
    own = [name for name in last if name.startswith("model.compressor.")]
    assert any("pre_fusion" in name for name in own) == bool(n_fusion)
    assert [name for name in own if torch.equal(first[name], last[name])] == []
    model, processor = load(tmp_path / "run" / "model")
    answerer = Answerer(model, processor)
    encoded = answerer.encode([tiny.noise(0), tiny.noise(1)])
    together = answerer.ask(encoded, [0, 1], tiny.QUESTIONS, 4)
    assert together == [answerer.ask(encoded[i : i + 1], [0], [tiny.QUESTIONS[i]], 4)[0] for i in range(2)]
