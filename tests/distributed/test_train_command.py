"""`htc-vlm train` under torchrun: two gloo processes share the images of a step."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from htc_vlm.cli.train import run

from .. import tiny_runs as tiny

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(output: Path, arguments: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    program = output.with_suffix(".py")
    program.write_text(tiny.RUN)
    command = [sys.executable, *launcher, str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_where_the_data_are_no_multiple_of_a_step(tmp_path: Path) -> None:
    """Five conversations in steps of two (a sixth is held out): at the data's end, two processes trained on more samples than
    one. Started as the docs say, with `--` before the program, since torchrun takes --start for its own --start-method."""
    conversations = tmp_path / "data"
    (conversations / "pictures").mkdir(parents=True)
    rows = []
    for i, answer in enumerate(["cat", "yes", "no", "red", "two", "dog"]):
        tiny.noise(i).save(conversations / "pictures" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{tiny.QUESTIONS[i % 2]}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (conversations / "train.json").write_text(json.dumps(rows))
    part = {"task": "mine", "json": str(conversations / "train.json"), "image_folder": str(conversations / "pictures")}
    preset = tmp_path / "own.yaml"
    settings = {"learning_rate": 1e-3, "steps": 6, "compressor": tiny.VOCO, "distill_weight": 0.5}
    preset.write_text(yaml.safe_dump({**tiny.preset(compress=settings), "prompt": "tiny", "data": [part], "held_out": 1}))
    one, two = tmp_path / "one", tmp_path / "two"
    start = str(tiny.checkpoint(tiny.NONE))
    for output, launcher in ((one, []), (two, [*TORCHRUN, "--"])):
        words = ["--preset", str(preset), "--stage", "compress", "--output", str(output), "--start", start, "--teacher", start]
        done = train(output, words, *launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    worst = max((alone[name].float() - shared[name].float()).abs().max().item() for name in alone)
    assert worst < 2e-3, worst
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    for name in ("loss", "held_out_loss"):
        here, there = ([row[name] for row in run if name in row] for run in rows)
        assert len(here) == {"loss": 6, "held_out_loss": 3}[name] and here == pytest.approx(there, abs=1e-3), name


def torchrun_commands() -> list[str]:
    """The torchrun lines of the docs, continuation lines joined."""
    repo = Path(__file__).resolve().parents[2]
    pages = [repo / "README.md", *sorted((repo / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("torchrun ")]


def test_torchrun_hands_the_documented_commands_to_htc_vlm_whole() -> None:
    """`torchrun htc-vlm train ... --start` stopped with "ambiguous option: --start could match --start-method"."""
    from torch.distributed.run import parse_args

    from htc_vlm.cli.train import parser

    commands = torchrun_commands()
    assert len(commands) >= 2 and any("--start" in command for command in commands)
    for command in commands:
        words = shlex.split(command)
        taken = parse_args(words[1:])
        assert taken.training_script == "$(which htc-vlm)" and taken.training_script_args[0] == "train"
        assert taken.training_script_args == words[-len(taken.training_script_args) :]
        assert parser().parse_args(taken.training_script_args[1:]).stage in ("instruct", "compress")


def test_missing_features_are_not_computed_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes wrote into one cache."""
    arguments = tiny.train_arguments(tiny.write_preset(tmp_path), "instruct", tmp_path / "run")
    arguments[arguments.index("--cache") + 1] = str(tmp_path / "empty")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run the command without torchrun first"):
        run(arguments)
