"""`htc-vlm train`: every refusal is one line and exit code 2; what is printed says what happens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from htc_vlm_cli import main

from .. import tiny_runs as tiny


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must refuse."""
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("htc-vlm train: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_stage_prints_its_table_and_report_and_saves_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From nothing to a checkpoint that can be asked."""
    arguments = tiny.train_arguments(tiny.write_preset(tmp_path), "instruct", tmp_path / "run")
    assert main(["train", *arguments, "--set", "stages.instruct.steps=2"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("vision_t", "language_m"))}
    assert rows["vision_tower"][0] == "0" and rows["language_model"][1] == "0"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["settings"]["steps"] == 2
    from htc_vlm import load

    assert load(tmp_path / "run" / "model")[0].model.compressor.name == "none"


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("instruct", ["--set", "colour=3"], "unknown key 'colour'"),
        ("instruct", ["--set", "stages.instruct.stps=3"], "unknown stage setting 'stps'"),
        ("instruct", ["--set", "stages.instruct.steps=many"], "steps is 'many'"),
        ("instruct", ["--set", "n_text"], "has no '='"),
        ("polish", [], "no stage 'polish'; it has: align, instruct, compress"),
        ("tokenizer", [], "--cache"),
        ("instruct", ["--set", "data=[{task: pictograms}]"], "empty data set"),
        ("instruct", ["--set", "n_text=3"], "n_text is 3, too few tokens"),
        ("compress", ["--set", "stages.compress.compressor={name: hct}"], "hct"),
        ("compress", ["--set", "stages.compress.compressor={name: voco, colour: 3}"], "voco has no setting 'colour'"),
        ("compress", ["--set", "stages.compress.distill_weight=1"], "a teacher is needed: --teacher"),
        ("compress", ["--mgvq", "no/such/file"], "no/such/file: no weights of quantizer mgvq there"),
        ("compress", ["--start", "no/such/folder"], "no/such/folder: no such folder"),
    ],
)
def test_refusals_say_what_to_do(
    stage: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, no half-begun run."""
    line = refused(tiny.train_arguments(tiny.write_preset(tmp_path), stage, tmp_path / "run", *more), capsys)
    assert message in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("option", ["start", "mgvq", "teacher", "vision", "cache", "device"])
def test_the_tokenizer_stage_refuses_what_it_does_not_read(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five options of a tokenizer were ignored."""
    value = "cuda" if option == "device" else "/nowhere"
    common = ["--preset", "tiny", "--stage", "tokenizer", "--output", str(tmp_path / "run")]
    assert f"--{option} {value} is not read by stage 'tokenizer'" in refused([*common, f"--{option}", value], capsys)


def test_compress_needs_a_start_and_a_quantizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are easily forgotten, and neither has a sensible default."""
    common = ["--preset", str(tiny.write_preset(tmp_path)), "--stage", "compress", "--output", str(tmp_path / "run")]
    assert "give it with --start" in refused(common, capsys)
    assert "--mgvq FILE" in refused([*common, "--start", str(tiny.checkpoint(tiny.NONE))], capsys)


def test_a_preset_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name and by path."""
    for name in ("no-such-preset", str(tmp_path / "none.yaml")):
        line = refused(["--preset", name, "--stage", "instruct", "--output", str(tmp_path)], capsys)
        assert "no such preset; shipped: " in line and "tiny" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "is not JSON"),
        ("[]", "holds no samples"),
        ('{"id": 1}', "has no conversations"),
        ('[{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": ""}]}]', "empty answer"),
        ('[{"id": "a", "image": "x.png", "conversations": []}]', "has no messages"),
    ],
)
def test_broken_conversations_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those without a supervised token: training on them would report a loss of nothing."""
    (tmp_path / "s.json").write_text(text)
    data = f"data=[{{task: llava, json: {tmp_path / 's.json'}}}]"
    where = ["--preset", str(tiny.write_preset(tmp_path)), "--stage", "instruct", "--output", str(tmp_path / "run")]
    line = refused([*where, "--start", str(tiny.checkpoint(tiny.NONE)), "--set", data, "--set", "prompt=tiny"], capsys)
    assert message in line


def test_a_poisoned_start_is_refused_at_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One weight that is not a number makes every loss so; Trainer alone would go on to the end."""
    from htc_vlm import load

    model, processor = load(tiny.checkpoint(tiny.NONE))
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "poisoned")
    processor.save_pretrained(tmp_path / "poisoned")
    more = ["--start", str(tmp_path / "poisoned")]
    line = refused(tiny.train_arguments(tiny.write_preset(tmp_path), "instruct", tmp_path / "run", *more), capsys)
    assert "the loss is nan at step 0; lower the learning rate or check the data" in line
