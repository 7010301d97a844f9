"""`htc-vlm train` under torchrun: two gloo processes share the images of a step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from htc_vlm.cli.train import run

from .. import tiny_runs as tiny

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(output: Path, arguments: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    program = output.with_suffix(".py")
    program.write_text(tiny.RUN)
    command = [sys.executable, *launcher, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    """Each process got as many images as one alone, the data ended half way, and the metrics stood there twice."""
    preset = tiny.write_preset(tmp_path, instruct={"learning_rate": "1e-3"})
    one, two = tmp_path / "one", tmp_path / "two"
    for output, launcher in ((one, []), (two, TORCHRUN)):
        done = train(output, tiny.train_arguments(preset, "instruct", output), *launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    begun = load_file(tiny.checkpoint(tiny.NONE) / "model.safetensors")
    assert alone.keys() == shared.keys()
    worst = max((alone[name].float() - shared[name].float()).abs().max().item() for name in alone)
    assert worst < 2e-3, worst  # saved in bfloat16; Adam turns rounding into steps
    assert sum(not torch.equal(begun[name].bfloat16(), alone[name].bfloat16()) for name in begun.keys() & alone.keys()) > 10
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    losses = [[json.loads(line)["loss"] for line in rows] for rows in lines]
    assert len(losses[0]) == len(losses[1]) == 4
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


def test_missing_features_are_not_computed_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes wrote into one cache."""
    arguments = tiny.train_arguments(tiny.write_preset(tmp_path), "instruct", tmp_path / "run")
    arguments[arguments.index("--cache") + 1] = str(tmp_path / "empty")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run the command without torchrun first"):
        run(arguments)
