"""Sharded training and loading in two gloo processes on the CPU: FSDP2 and tensor parallelism, by torch and transformers.

The processes (two_processes.py) are started once for all tests here: importing takes longer than what they do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import tiny_runs as tiny

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parents[2]
WORLD = 2
TIMEOUT_S = 900  # on a busy machine; 20 seconds alone
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process found."""
    folder = tmp_path_factory.mktemp("distributed")
    script = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    places = [str(folder / "rendezvous"), str(tiny.checkpoint(tiny.HTC)), str(folder)]
    started = []
    for rank in range(WORLD):
        environment = {"PYTHONPATH": str(REPO / "src"), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        started.append(
            subprocess.Popen(
                [*script, str(rank), *places], env={**os.environ, **environment},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("work", ["fsdp", "native_fsdp"])
def test_a_sharded_step_is_that_of_one_process(found: Found, work: str) -> None:
    """fully_shard by hand, or by transformers while loading: a gradient summed instead of averaged would go unnoticed."""
    for one in (process[work] for process in found):
        assert one["sharded_weights"] > 50 and 0.4 < one["local_share"] < 0.6  # each process holds half
        assert one["loss"][0] == pytest.approx(one["loss"][1], rel=1e-5)
        assert one["moved"] > 1e-3 and one["difference"] < 1e-6


@pytest.mark.parametrize("work", ["fsdp", "native_fsdp"])
def test_a_checkpoint_saved_from_shards_is_whole(found: Found, work: str) -> None:
    """The save crashed at the first sharded weight; and a process that gathers alone waits for the others for ever."""
    saved, nothing = (process[work]["saved"] for process in found)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(saved["files"])
    assert saved["worst_beyond_rounding"] <= 0  # loaded in one process, against the weights of one process
    assert nothing is None


def test_half_of_the_heads_in_each_process_gives_the_same_logits(found: Found) -> None:
    """The masked pass runs on sharded heads; cells, whose heads would be half of the image, are refused and never kept."""
    for one in (process["tensor_parallel"] for process in found):
        assert one["sharded_weights"] >= 14  # 7 matrices in each of 2 layers, and the vocabulary's
        assert one["logits"] < 1e-5
        assert "error" in one["compress"] and "error" in one["generate"]
