"""Exact resume, refusals, distillation and metrics of the training loop."""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from htc_vlm.cli import train as command
from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.train import presets
from htc_vlm.train.held_out import HeldOut
from htc_vlm.train.loop import LoopSettings, StageTrainer, follow_loss, last_whole_checkpoint, plot_loss, run
from htc_vlm.train.stages import STAGES

from .. import processes
from .. import tiny_runs as tiny

STEPS, SAVE_EVERY = 16, 6


def preset_file(folder: Path) -> Path:
    return tiny.write_preset(folder, compress={"steps": STEPS, "save_every": SAVE_EVERY})


@functools.cache
def uninterrupted() -> Path:
    """The output of a compress stage that nobody disturbed; copy it before changing it."""
    folder = tiny.root() / "uninterrupted"
    folder.mkdir()
    assert command.run(tiny.train_arguments(preset_file(folder), "compress", folder / "run")) == 0
    return folder / "run"


def weights(output: Path) -> dict[str, Tensor]:
    """The final weights in float32."""
    return load_file(output / f"checkpoint-{STEPS}" / "model.safetensors")


def assert_same_run(output: Path) -> None:
    """Bit-equal final weights, before and after rounding, and metrics of every step once."""
    there, here = weights(uninterrupted()), weights(output)
    assert there.keys() == here.keys()
    assert [name for name in there if not torch.equal(there[name], here[name])] == []
    saved = [load_file(folder / "model" / "model.safetensors") for folder in (output, uninterrupted())]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)


def n_logged(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def start_and_kill(arguments: list[str], output: Path, after: int, delay_s: float = 0.0) -> int:
    """Train in a process of its own; SIGKILL it `delay_s` after it came `after` steps further. Its exit code."""
    goal = n_logged(output) + after
    command_line = [sys.executable, "-c", tiny.RUN, *arguments]
    output.mkdir(exist_ok=True)
    with (output / "stderr").open("w") as errors:
        process = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=errors)
    deadline = time.monotonic() + processes.PATIENCE_S
    while process.poll() is None and n_logged(output) < goal and time.monotonic() < deadline:
        time.sleep(0.002 if n_logged(output) else 0.05)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL gives no chance to tidy up; optimizer, schedule, data order and metrics must all go on where they were."""
    output = tmp_path / "run"
    arguments = tiny.train_arguments(preset_file(tmp_path), "compress", output)
    processes.killed_at("htc_vlm.train.loop:StageTrainer.compute_loss", SAVE_EVERY + 4, tiny.RUN, *arguments)
    assert n_logged(output) == SAVE_EVERY + 3 and not (output / "model").exists()
    assert command.run(arguments) == 0
    assert json.loads((output / "report.json").read_text())["resumed_from"] == f"checkpoint-{SAVE_EVERY}"
    assert_same_run(output)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Four kills at random moments, also while a checkpoint is being written."""
    output, rng = tmp_path / "run", random.Random(0)
    arguments = tiny.train_arguments(preset_file(tmp_path), "compress", output)
    for _ in range(4):
        assert start_and_kill(arguments, output, after=3, delay_s=0.3 * rng.random()) in (0, -signal.SIGKILL)
    assert command.run(arguments) == 0
    assert_same_run(output)


def cut_state(checkpoint: Path) -> None:
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text()[:-40])


def remove(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()


def empty(name: str, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(b"")


DAMAGES = {
    "state cut off": cut_state,
    "no state": functools.partial(remove, "trainer_state.json"),
    "no optimizer": functools.partial(remove, "optimizer.pt"),
    "no schedule": functools.partial(remove, "scheduler.pt"),
    "no random state": functools.partial(remove, "rng_state.pth"),
    "no weights": functools.partial(remove, "model.safetensors"),
    "empty weights": functools.partial(empty, "model.safetensors"),
}


def interrupted(folder: Path) -> Path:
    """A copy of the uninterrupted run as a kill leaves it: two checkpoints and no model."""
    output = shutil.copytree(uninterrupted(), folder / "run")
    for name in ("model", "report.json", "loss.png"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-12", "checkpoint-16"}
    return output


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_half_written_checkpoint_is_passed_over(damage: str, tmp_path: Path) -> None:
    """Trainer goes on without an optimizer's state, silently, and ends elsewhere."""
    output = interrupted(tmp_path)
    DAMAGES[damage](output / "checkpoint-16")
    assert last_whole_checkpoint(output) == output / "checkpoint-12"
    assert not (output / "checkpoint-16").exists()


@pytest.mark.parametrize(("n_damaged", "resumed_from"), [(1, "checkpoint-12"), (2, None)])
def test_after_half_written_checkpoints_the_run_ends_with_the_same_weights(
    n_damaged: int, resumed_from: str | None, tmp_path: Path
) -> None:
    """Also from the very beginning, when no checkpoint is whole; a half-written line of metrics goes too."""
    output = interrupted(tmp_path)
    for checkpoint in sorted(output.glob("checkpoint-*"))[-n_damaged:]:
        cut_state(checkpoint)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    assert command.run(tiny.train_arguments(preset_file(tmp_path), "compress", output)) == 0
    assert json.loads((output / "report.json").read_text())["resumed_from"] == resumed_from
    assert_same_run(output)


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    """A script that starts all stages again must not train any of them further."""
    output = shutil.copytree(uninterrupted(), tmp_path / "run")
    assert command.run(tiny.train_arguments(preset_file(tmp_path), "compress", output)) == 0
    assert_same_run(output)


def test_the_loss_is_drawn(tmp_path: Path) -> None:
    """With a held-out loss and a step that was infinite; and of a run that logged nothing."""
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 2, "held_out_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("metrics.jsonl", "nothing.jsonl"):
        plot_loss(tmp_path / name, tmp_path / "loss.png", "compress")
        with Image.open(tmp_path / "loss.png") as picture:
            assert picture.size == (720, 420)


def test_a_run_leaves_a_report_a_plot_and_the_preset() -> None:
    """The final loss is that of the last logged step, also after a resume."""
    output = uninterrupted()
    report = json.loads((output / "report.json").read_text())
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert (report["steps"], report["loss"], report["stage"]) == (STEPS, last["loss"], "compress")
    assert json.loads((output / "preset.json").read_text())["stages"]["compress"]["steps"] == STEPS
    assert (output / "loss.png").is_file()


def test_only_what_the_stage_trains_has_changed() -> None:
    """requires_grad says what should be; the weights say what was. The quantizer and the tower are bit-equal."""
    before = load_file(tiny.checkpoint(tiny.NONE) / "model.safetensors")
    after = weights(uninterrupted())
    tower = [name for name in before if "vision_tower" in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    codes = load_file(tiny.quantizer() / "model.safetensors")
    used = [name for name in codes if not name.startswith(("decoder.", "post_quant_conv."))]
    assert used and all(torch.equal(codes[name], after[f"model.compressor.quantizer.{name}"]) for name in used)
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(before[projector], after[projector])


# ------------------------------------------------------------------------------------------------ refusals
def batches(n: int, compressor: dict[str, Any] = tiny.HTC) -> list[dict[str, Tensor]]:
    """n samples of one packed question."""
    model, processor = tiny.loaded(compressor)
    ids = processor.tokenizer.encode(processor.image_text() + tiny.QUESTIONS[0] + " cat</s>", add_special_tokens=False)
    labels = [-100] * (len(ids) - 2) + ids[-2:]
    pixels = processor(images=[tiny.noise(0)], return_tensors="pt")["pixel_values"]
    return [{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels[0]}] * n


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    out = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {**out, "attention_mask": torch.ones_like(out["input_ids"])}


def fresh(compressor: dict[str, Any] = tiny.HTC) -> torch.nn.Module:
    from htc_vlm import load

    return load(tiny.checkpoint(compressor))[0].float().train()


SHORT = LoopSettings(steps=4, images_per_step=2, warmup_steps=0, save_every=1, log_every=1)


def test_a_loss_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    """Trainer's default replaces NaN in the log by the mean of what came before."""
    model = fresh()
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the loss is nan at step 0; lower the learning rate"):
        run(model, STAGES["compress"], batches(8), stack, tmp_path, SHORT)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_gradient_that_is_not_a_number_reaches_no_checkpoint(tmp_path: Path) -> None:
    """The loss of that step is still finite: the weights would be saved broken, and each resume would begin with them."""
    model, calls = fresh(), []

    def break_third(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * math.inf if len(calls) == 3 else gradient

    model.model.multi_modal_projector.linear_2.weight.register_hook(break_third)
    with pytest.raises(ValueError, match="the gradient's norm is (nan|inf) at step 2; lower the learning rate"):
        run(model, STAGES["compress"], batches(8), stack, tmp_path, SHORT)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; give at least 1"),
        ({"images_per_step": 0}, "images_per_step is 0"),
        ({"precision": "float16"}, "precision is 'float16'; known: float32, bfloat16"),
        ({"extra": {"learning_rat": 1.0}}, "has no 'learning_rat'"),
        ({"extra": {"max_steps": 1}}, "extra: max_steps is what `steps` says; leave it out"),
        ({"extra": {"num_train_epochs": 1}}, "extra: num_train_epochs is what `steps` says"),
        ({"extra": {"per_device_train_batch_size": 1}}, "extra: per_device_train_batch_size is what `images_per_step` says"),
        ({"answers_only": True, "distill_weight": 0.5}, "does not go with distill_weight"),
        ({"answers_only": True, "extra": {"label_smoothing_factor": 0.1}}, "does not go with label_smoothing_factor"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    """To Trainer, 0 steps means 3 epochs."""
    with pytest.raises(ValueError, match=message):
        run(fresh(), STAGES["compress"], batches(2), stack, tmp_path, LoopSettings(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("compressor", [tiny.NONE, tiny.HTC, {"name": "readers", "n_readers": 2, "n_looks": 2}])
def test_logits_of_answers_alone_make_the_same_loss_and_gradients(compressor: dict[str, Any]) -> None:
    """Divided by the labels of all accumulated batches, where Trainer says how many they are."""
    one, other = fresh(compressor), fresh(compressor)
    samples = stack(batches(2, compressor))
    samples["labels"][1, -2] = -100  # one answer is shorter
    for n_labels in (None, 11):
        more = {} if n_labels is None else {"num_items_in_batch": n_labels}
        whole, answers = one(**samples, **more).loss, other(**samples, answers_only=True, **more)
        assert answers.logits is None
        torch.testing.assert_close(answers.loss, whole, atol=1e-6, rtol=1e-6)
    whole.backward()
    answers.loss.backward()
    gradients = dict(other.named_parameters())
    for name, weight in one.named_parameters():
        torch.testing.assert_close(gradients[name].grad, weight.grad, atol=1e-6, rtol=1e-4, msg=name)
    with pytest.raises(ValueError, match="needs labels"):
        one(**{k: v for k, v in samples.items() if k != "labels"}, answers_only=True)
    with pytest.raises(ValueError, match="leave out compressed and logits_to_keep"):
        one(**samples, answers_only=True, logits_to_keep=1)


def test_a_run_with_logits_of_answers_alone_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting may change between two starts of a run, so it must change nothing but time."""
    ends, asked = [], []
    plain = HtcVlmForConditionalGeneration._loss_of_answers
    spied = lambda *given: (asked.append(1), plain(*given))[1]  # noqa: E731
    monkeypatch.setattr(HtcVlmForConditionalGeneration, "_loss_of_answers", spied)
    for answers_only in (False, True):
        model = fresh()
        settings = LoopSettings(steps=3, images_per_step=2, warmup_steps=0, save_every=9, answers_only=answers_only)
        held_out = HeldOut(batches(2), stack, 2, every=3)  # type: ignore[arg-type]
        run(model, STAGES["compress"], batches(6), stack, tmp_path / str(answers_only), settings, held_out=held_out)
        ends.append(model.state_dict())
        assert len(asked) == (3 + 1) * answers_only  # three steps, and the loss that is held out
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-5, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------ distillation
def test_the_distillation_loss_by_hand() -> None:
    """Two tokens, two words: KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2, and 0 where both agree."""
    student = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    teacher = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]])
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert follow_loss(student, teacher, 2).item() == pytest.approx(by_hand / 2, abs=1e-6)


def trainer(weight: float, teach: object, folder: Path) -> StageTrainer:
    from htc_vlm.train.loop import _arguments

    return StageTrainer(
        model=fresh(), args=_arguments(folder, SHORT), train_dataset=batches(2), data_collator=stack, teach=teach,
        distill_weight=weight,
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_teachers_share_of_the_loss_is_the_weight(tmp_path: Path) -> None:
    """At weight 1 only the teacher counts, at 0.25 a quarter; a teacher that agrees leaves nothing to learn."""
    batch, supervised = stack(batches(2)), 4
    own = fresh()
    with torch.no_grad():
        out = own(**batch)
    logits = out.logits[:, :-1][batch["labels"][:, 1:] != -100]
    assert len(logits) == supervised
    agreeing = trainer(1.0, lambda inputs: logits, tmp_path)
    assert agreeing.compute_loss(agreeing.model, batch).item() == pytest.approx(0, abs=1e-5)
    other = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    follow = follow_loss(logits, other, supervised).item()
    for weight in (1.0, 0.25):
        one = trainer(weight, lambda inputs: other, tmp_path)
        loss = one.compute_loss(one.model, batch)
        assert loss.item() == pytest.approx((1 - weight) * out.loss.item() + weight * follow, rel=1e-4)
        loss.backward()
        gradients = [parameter.grad for parameter in one.model.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_accumulated_batches_weigh_tokens_alike(tmp_path: Path) -> None:
    """The teacher's share is divided by the tokens of all accumulated batches, as the language model's loss is."""
    batch = stack(batches(2))
    other = torch.zeros(4, fresh().config.text_config.vocab_size)
    one = trainer(1.0, lambda inputs: other, tmp_path)
    alone, half = (one.compute_loss(one.model, batch, num_items_in_batch=n).item() for n in (4, 8))
    assert half == pytest.approx(alone / 2, rel=1e-5)


def test_the_last_step_is_logged_whatever_log_every_is(tmp_path: Path) -> None:
    """A run shorter than log_every would leave no loss at all."""
    settings = LoopSettings(steps=3, images_per_step=1, log_every=2, save_every=9)
    report = run(fresh(), STAGES["align"], batches(3), stack, tmp_path, settings)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3] and report["loss"] == rows[-1]["loss"]


def test_presets_and_loop_agree_on_what_a_stage_may_set() -> None:
    """A field that presets cannot type would raise KeyError at the first user."""
    settings = LoopSettings(extra={})
    given = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    assert presets.loop_settings(given) == settings
