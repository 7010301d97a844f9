"""A training run from outside: begun once, resumed with the same or refused, held-out loss, LoRA, own pictures."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from htc_vlm.data.collate import Collator
from htc_vlm.data.conversations import Record
from htc_vlm.files import umask
from htc_vlm.train import run_record, setup
from htc_vlm.train.conversation_data import ConversationData
from htc_vlm.train.held_out import HeldOut, hold_out
from htc_vlm.train.loop import LoopSettings, StageTrainer, _arguments
from htc_vlm.train.lora import settings_from
from htc_vlm.train.order import RunOrder
from htc_vlm.train.quantizer_stage import train_tokenizer_stage
from htc_vlm_cli import main

from .. import tiny_runs as tiny

N_RECORDS = 5  # not a multiple of the 2 images of a step


def conversations(folder: Path) -> Path:
    """Five samples with a picture and an answer of its own each."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i, answer in enumerate(["cat", "yes", "no", "red", "two"][:N_RECORDS]):
        tiny.noise(i).save(folder / "pictures" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{tiny.QUESTIONS[i % 2]}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def own_preset(folder: Path, **more: Any) -> dict[str, Any]:
    """`tiny.preset` on the conversations in a folder."""
    part = {"task": "mine", "json": str(folder / "train.json"), "image_folder": str(folder / "pictures")}
    return {**tiny.preset(**more.pop("stages", {})), "prompt": "tiny", "data": [part], **more}


@functools.cache
def data() -> Path:
    return conversations(tiny.root() / "own-conversations")


def train(output: Path, stage: str = "align", preset: dict[str, Any] | None = None, **kw: Any) -> dict[str, Any]:
    return setup.train_stage(preset or own_preset(data()), stage, output, str(tiny.checkpoint(tiny.NONE)), **kw)


@functools.cache
def done() -> Path:
    """A finished align stage of 4 steps on the conversations; copy it before changing it."""
    train(tiny.root() / "own-run")
    return tiny.root() / "own-run"


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys() and [name for name in here if not torch.equal(here[name], there[name])] == []


# ------------------------------------------------------------------------------------------------ once begun
def test_a_finished_run_on_conversations_trains_no_further(tmp_path: Path) -> None:
    """Its 20 steps became 21, then 22: Trainer takes one step before it looks whether all are done."""
    output = shutil.copytree(done(), tmp_path / "run")
    before = (output / "report.json").read_text(), (output / "metrics.jsonl").read_text()
    assert train(output)["steps"] == 4
    assert ((output / "report.json").read_text(), (output / "metrics.jsonl").read_text()) == before
    assert_same_weights(output, done())


@pytest.mark.parametrize("left", ["nothing after the checkpoint", "a model half written"])
def test_stopped_between_the_last_checkpoint_and_the_model_the_weights_are_the_same(left: str, tmp_path: Path) -> None:
    """Ctrl-C there gave other weights: the run took one more step."""
    output = shutil.copytree(done(), tmp_path / "run")
    (output / "report.json").unlink()
    shutil.rmtree(output / "model")
    if left == "a model half written":
        (output / "model.partial").mkdir()
        (output / "model.partial" / "config.json").write_text("{")
    assert train(output)["resumed_from"] == "checkpoint-4"
    assert_same_weights(output, done())
    assert not (output / "model.partial").exists()


CHANGES = {
    "stages.align.learning_rate was 0.01, is 0.02": {"stages": {"align": {"learning_rate": 0.02}}},
    "stages.align.steps was 4, is 6": {"stages": {"align": {"steps": 6}}},
    "stages.align.lora.rank was not given, is 2": {"stages": {"align": {"lora": {"rank": 2}}}},
    "held_out was not given, is 1": {"held_out": 1},
    "data was ": {"data": [{"task": "pictograms", "images": 8}]},
}


@pytest.mark.parametrize("message", sorted(CHANGES))
def test_a_run_begun_with_other_settings_is_refused_by_their_names(message: str, tmp_path: Path) -> None:
    """It went on with the new settings from the old weights, without a word."""
    output = shutil.copytree(done(), tmp_path / "run")
    with pytest.raises(ValueError, match=f"run: begun with other settings: {message}.*or another --output"):
        train(output, preset=own_preset(data(), **CHANGES[message]))


def test_another_start_stage_or_data_is_another_run(tmp_path: Path) -> None:
    """The conversations are compared by what is in the file, not by its name."""
    output = shutil.copytree(done(), tmp_path / "run")
    with pytest.raises(ValueError, match="stage was 'align', is 'instruct'"):
        train(output, "instruct")
    with pytest.raises(ValueError, match="--start was "):
        setup.train_stage(own_preset(data()), "align", output, str(tiny.checkpoint(tiny.VOCO)))
    moved = shutil.copytree(data(), tmp_path / "moved")
    assert train(output, preset=own_preset(moved))["steps"] == 4
    (moved / "train.json").write_text((moved / "train.json").read_text().replace("red", "blue"))
    with pytest.raises(ValueError, match="begun with other settings: data was"):
        train(output, preset=own_preset(moved))


def test_what_changes_no_weights_may_change(tmp_path: Path) -> None:
    """How often a run saves and logs is nobody's business."""
    output = shutil.copytree(done(), tmp_path / "run")
    assert train(output, preset=own_preset(data(), stages={"align": {"save_every": 3, "log_every": 2}}))["steps"] == 4


def test_a_wrong_command_leaves_no_record(tmp_path: Path) -> None:
    """The corrected command would be refused as another run."""
    with pytest.raises(ValueError, match="hct"):
        train(tmp_path / "run", preset=own_preset(data(), stages={"align": {"compressor": {"name": "hct"}}}))
    assert not (tmp_path / "run" / run_record.FILE).exists()


@pytest.mark.parametrize("stage", ["align", "tokenizer"])
def test_a_folder_with_somebodys_files_is_not_trained_into(stage: str, tmp_path: Path) -> None:
    """The tokenizer stage wrote its config.json and model.safetensors over those of the checkpoint that lay there."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny.checkpoint(tiny.NONE), folder / "model" if stage == "align" else folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already there, and not of a training run; give another --output"):
        if stage == "align":
            train(folder)
        else:
            train_tokenizer_stage(own_preset(data(), stages={}) | {"stages": {"tokenizer": TOKENIZER}}, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_begun_before_settings_were_recorded_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of an older version must not be lost."""
    output = shutil.copytree(done(), tmp_path / "run")
    (output / run_record.FILE).unlink()
    assert train(output)["steps"] == 4
    assert "begun before settings were recorded" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ order, processes
def test_a_step_at_the_datas_end_goes_on_with_the_next_epoch() -> None:
    """Trainer filled the last batch up from the data's beginning, or cut it, by the number of processes."""
    order = list(RunOrder(n_data=5, n_samples=12, seed=3))
    assert order[:5] == [0, 1, 2, 3, 4] and sorted(order[5:10]) == [0, 1, 2, 3, 4] and len(order) == 12
    assert order == list(RunOrder(n_data=5, n_samples=12, seed=3)) != list(RunOrder(n_data=5, n_samples=12, seed=4))


def test_every_step_reads_images_per_step_samples_and_logs_true_epochs() -> None:
    """4 steps of 2 are 8 samples of 5: 1.6 epochs."""
    rows = [json.loads(line) for line in (done() / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 0.4), (2, 0.8), (3, 1.2), (4, 1.6)]


def test_the_teachers_share_is_scaled_as_trainers_own_loss_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer multiplies the loss by the number of processes, whose gradients are averaged; the teacher's part was not, so two
    processes learned half as much from it."""
    from htc_vlm import load

    model, processor = load(tiny.checkpoint(tiny.NONE))
    every = ConversationData(own_preset(data()), processor)
    batch = Collator(processor.tokenizer.pad_token_id)([every[0]])
    n = int((batch["labels"][:, 1:] != -100).sum())
    settings = LoopSettings(steps=1, images_per_step=1)
    trainer = StageTrainer(
        model=model, args=_arguments(tmp_path, settings), train_dataset=every, distill_weight=1.0,
        teach=lambda inputs: torch.zeros(n, model.config.text_config.vocab_size),
    )  # fmt: skip
    alone = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(2 * n)).item()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    together = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(2 * n)).item()
    assert together == pytest.approx(2 * alone)


# ------------------------------------------------------------------------------------------------ held out
def test_no_picture_is_both_trained_on_and_held_out() -> None:
    """The last two are held out; the first shares a picture with the last."""
    a, b, c, d = (Path(name) for name in "abcd")
    records = [Record(str(i), (), images) for i, images in enumerate([(a,), (b,), (), (c, d), (a,)])]
    train_on, held = hold_out(records, 2)
    assert ([r.id for r in train_on], [r.id for r in held]) == (["1", "2"], ["3", "4"])
    for n in (-1, 5):
        with pytest.raises(ValueError, match=f"held_out is {n} of 5 samples; give 0 to 4"):
            hold_out(records, n)
    with pytest.raises(ValueError, match="shares a picture"):
        hold_out([Record("0", (), (a,)), Record("1", (), (a,))], 1)


def test_the_held_out_loss_is_that_of_the_weights_of_its_step(tmp_path: Path) -> None:
    """Equal to one pass of the last checkpoint over the samples held out."""
    from htc_vlm import load

    preset = own_preset(data(), held_out=2, stages={"align": {"measure_every": 2}})
    report = train(tmp_path / "run", preset=preset)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4]
    assert report["held_out_loss"] == rows[-1]["held_out_loss"]
    model, processor = load(tiny.checkpoint(tiny.NONE))
    model.load_state_dict(load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"), strict=False)
    _, unseen = ConversationData(preset, processor).split(2)
    assert unseen is not None and len(unseen) == 2
    collator = Collator(processor.tokenizer.pad_token_id, multiple_of=16)
    with torch.no_grad():
        once = float(model(**collator([unseen[0], unseen[1]])).loss)
    assert rows[-1]["held_out_loss"] == pytest.approx(once, abs=1e-5)


def test_one_batch_at_a_time_or_all_at_once_give_the_same_held_out_loss(tmp_path: Path) -> None:
    """The mean of batches weighs a short answer in a small batch more; here one sample has three answer tokens, one has two."""
    from htc_vlm import load

    model, processor = load(tiny.checkpoint(tiny.NONE))
    every = ConversationData(own_preset(data()), processor)
    trainer = StageTrainer(model=model, args=_arguments(tmp_path, LoopSettings(images_per_step=1)), train_dataset=every)
    trainer.model_wrapped = model
    state = torch.get_rng_state()
    losses = [HeldOut(every, Collator(0, multiple_of=16), n, 1).loss(trainer) for n in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_tasks_hold_out_pictures_of_the_validation_split(tmp_path: Path) -> None:
    """With a code, as the compress stage has it."""
    preset = {**tiny.preset(compress={"steps": 2}), "held_out": 3}
    report = setup.train_stage(
        preset, "compress", tmp_path / "run", str(tiny.checkpoint(tiny.NONE)), tiny.cache(), mgvq=str(tiny.quantizer())
    )
    assert 0 < report["held_out_loss"] < 100
    assert (tiny.cache() / "pictograms-val-3").is_dir()


# ------------------------------------------------------------------------------------------------ LoRA
LORA = {"stages": {"compress": {"compressor": {"name": "voco"}, "lora": {"rank": 2, "alpha": 4}}}}


def test_lora_trains_adapters_and_the_bottleneck_and_leaves_an_ordinary_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bottleneck's embedding is a row of the frozen matrix: without its own adapter nothing would teach that token."""
    from htc_vlm import load

    train(tmp_path / "run", "compress", own_preset(data(), **LORA))
    model, _ = load(tmp_path / "run" / "model")
    start, processor = load(tiny.checkpoint(tiny.VOCO))
    changed = {
        name for name, weight in model.named_parameters()
        if not torch.equal(weight, dict(start.named_parameters())[name].bfloat16().float())
    }  # fmt: skip
    layers = [name for name in changed if ".layers." in name]
    assert layers and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
                          for name in layers)  # fmt: skip
    assert any("multi_modal_projector" in name for name in changed) and not any("vision_tower" in name for name in changed)
    there, here = (m.get_input_embeddings().weight for m in (start, model))
    rows = [i for i in range(len(here)) if not torch.equal(here[i], there[i].bfloat16().float())]
    assert rows == [model.config.bottleneck_token_id]
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    table = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("language_model"))
    matrices = [m.weight.shape for n, m in start.named_modules() if ".layers." in n and n.endswith("_proj")]
    assert int(table.split()[1].replace(",", "")) == sum(2 * (a + b) for a, b in matrices) + here.shape[1]


def test_a_lora_run_stopped_and_started_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Adapters, their optimizer and the bottleneck's row come back from the checkpoint."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, "compress", own_preset(data(), **LORA))
    shutil.copytree(one, two)
    for name in ("model", "checkpoint-4"):
        shutil.rmtree(two / name)
    (two / "report.json").unlink()
    assert train(two, "compress", own_preset(data(), **LORA))["resumed_from"] == "checkpoint-2"
    assert_same_weights(one, two)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"r": 8}, "known settings: rank, alpha, dropout, modules"),
        ({"rank": 0}, "lora.rank is 0; give a whole number of at least 1"),
        ({"modules": ["lm_head"]}, r"lora.modules is \['lm_head'\]; known: q_proj"),
    ],
)
def test_wrong_lora_settings_are_refused(block: dict[str, Any], message: str) -> None:
    """PEFT would train nothing, or everything."""
    with pytest.raises(ValueError, match=message):
        settings_from(block)


# ------------------------------------------------------------------------------------------------ own pictures, devices
TOKENIZER = {"image_size": 32, "n_pictures": 6, "changes": tiny.SIZES, "steps": 2, "batch_size": 2, "crop": 16}


@pytest.mark.parametrize("kind", ["conversations", "folder"])
def test_the_tokenizer_learns_from_peoples_own_pictures(kind: str, tmp_path: Path) -> None:
    """`no data set 'mine'`: only the three toy sets could train it. Five pictures: one is held out."""
    part = {"task": "mine", "image_folder": str(data() / "pictures")}
    if kind == "conversations":
        part["json"] = str(data() / "train.json")
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"data": [part], "stages": {"tokenizer": TOKENIZER}}))
    arguments = ["train", "--preset", str(file), "--stage", "tokenizer", "--output", str(tmp_path / "mgvq")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "mgvq" / "report.json").read_text())
    assert (report["trained"]["n_pictures"], report["held_out"]["n_pictures"]) == (4, 1)


def test_own_pictures_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    """All of them, before training."""
    folder = tiny.hostile_folder(tmp_path / "wild")
    preset = {"name": "own", "data": [{"task": "mine", "image_folder": str(folder)}], "stages": {"tokenizer": TOKENIZER}}
    with pytest.raises(ValueError, match="pictures cannot be used; remove them: .*text.png"):
        train_tokenizer_stage({**preset, "stages": {"tokenizer": {**TOKENIZER, "n_pictures": 20}}}, tmp_path / "mgvq")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A typing error would train on the CPU for days."""
    with pytest.raises(ValueError, match="device is 'gpu'; known: auto, cpu, cuda"):
        train(tmp_path / "run", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            train(tmp_path / "run", device="cuda")


def test_a_finished_adapter_run_trains_no_further(tmp_path: Path) -> None:
    """It leaves an adapter and no model; a script that starts all stages again must not train it further."""
    block = {"compressor": {"name": "readers", "n_readers": 2}, "trains": "adapter", "steps": 1, "save_every": 1}
    preset = own_preset(data(), stages={"compress": block})
    train(tmp_path / "run", "compress", preset)
    files = list((tmp_path / "run" / "adapter").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert train(tmp_path / "run", "compress", preset)["steps"] == 1
    assert {path.name: path.stat().st_mtime_ns for path in files} == before and len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask()}
