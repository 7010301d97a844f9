"""One training loop for all stages: transformers' Trainer with our data, refusals, metrics and exact resume.

Source:  transformers Trainer (5.23); HTC-VLM Eq. 9 (plain language-model loss).
Differs: distillation from the upper bound is ours, off by default; a checkpoint that a kill left half-written is
         skipped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from htc_vlm.files import save_figure, write_text
from htc_vlm.train.held_out import HeldOut
from htc_vlm.train.order import RunOrder
from htc_vlm.train.stages import Stage, freeze, trainable_table


@dataclass(frozen=True)
class LoopSettings:
    """What a stage's block in a preset may set; the rest of transformers' TrainingArguments goes into `extra`."""

    steps: int = 1000
    images_per_step: int = 16  # of all processes and accumulated passes together
    learning_rate: float = 1e-3
    min_learning_rate_share: float = 0.03
    warmup_steps: int = 100
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0
    save_every: int = 200
    log_every: int = 20
    measure_every: int = 0  # steps between two measurements of the held-out loss; 0: as save_every
    seed: int = 0
    compile: bool = False
    workers: int = 0
    precision: str = "float32"  # or bfloat16: autocast
    answers_only: bool = False  # logits only where something is answered: the same loss, less time with a large vocabulary
    distill_weight: float = 0.0  # ours: share of the loss that follows the teacher's answer distribution
    extra: dict[str, Any] | None = None


# TrainingArguments that `extra` would change behind a setting's back, or that nothing would read.
SET_BY = {
    "output_dir": "--output", "max_steps": "`steps`", "num_train_epochs": "`steps`", "learning_rate": "`learning_rate`",
    "per_device_train_batch_size": "`images_per_step`", "warmup_steps": "`warmup_steps`", "warmup_ratio": "`warmup_steps`",
    "weight_decay": "`weight_decay`", "adam_beta2": "`beta2`", "max_grad_norm": "`clip`", "save_steps": "`save_every`",
    "logging_steps": "`log_every`", "seed": "`seed`", "data_seed": "`seed`", "bf16": "`precision`", "use_cpu": "--device",
    "dataloader_num_workers": "`workers`", "resume_from_checkpoint": "--output",
}  # fmt: skip
# Trainer goes on without those that are missing, from other weights than an uninterrupted run has.
NEEDED_TO_RESUME = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


def last_whole_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end; newer ones, half-written, are removed."""
    found = [path for path in output.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for path in sorted(found, key=_step_of, reverse=True):
        if is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Are all files there, and the last one that Trainer writes (trainer_state.json) complete?"""
    state = checkpoint / "trainer_state.json"
    found = [list(checkpoint.glob(pattern)) for pattern in (*NEEDED_TO_RESUME, state.name)]
    if not all(files and all(file.stat().st_size for file in files) for files in found):
        return False
    try:
        step = json.loads(state.read_text())["global_step"]
    except (ValueError, KeyError, TypeError):  # cut off
        return False
    return bool(step == _step_of(checkpoint))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


class StageTrainer(Trainer):
    """Trainer in the order of a run (RunOrder), which refuses a loss that is not finite, and may follow a teacher."""

    def __init__(
        self,
        *args: Any,
        teach: Callable[[dict[str, Tensor]], Tensor] | None = None,
        distill_weight: float = 0.0,
        images_per_step: int = 1,
        answers_only: bool = False,
        **kw: Any,
    ):
        super().__init__(*args, **kw)
        self.more_inputs = {"answers_only": True} if answers_only else {}
        self.teach, self.distill_weight, self.images_per_step = teach, distill_weight, images_per_step

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RunOrder:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return RunOrder(len(data), self.args.max_steps * self.images_per_step, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, **self.more_inputs}  # type: ignore[dict-item]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.teach is not None and self.distill_weight:
            supervised = inputs["labels"][:, 1:] != -100
            student, teacher = outputs.logits[:, :-1][supervised], self.teach(inputs)
            follow = follow_loss(student, teacher, len(student) if num_items_in_batch is None else num_items_in_batch)
            if num_items_in_batch is not None:  # of all processes, whose gradients are averaged: as Trainer scales its loss
                follow = follow * self.accelerator.num_processes
            loss = (1 - self.distill_weight) * loss + self.distill_weight * follow
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower the learning rate or check the "
                "data. Checkpoints up to here are kept"
            )
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before each step of the optimizer: a step along a broken gradient would end up in a checkpoint."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step}; lower the learning rate or check "
                "the data. Checkpoints up to here are kept"
            )
        return norm


def follow_loss(student: Tensor, teacher: Tensor, n_tokens: int | Tensor) -> Tensor:
    """Logits (T, V) of both -> sum over tokens of KL(teacher || student), divided by n_tokens; nats.

    >>> log = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    >>> round(follow_loss(*log, n_tokens=1).item(), 4)     # 0.75 ln 1.5 + 0.25 ln 0.5
    0.1308
    """
    log_student, log_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum") / n_tokens


class JsonLines(TrainerCallback):
    """metrics.jsonl: one line per logged step, appended; lines after the step that a run resumes from are dropped first.

    held_out: its loss is measured, and logged with its step. epochs_per_step: share of the data that a step reads.
    """

    def __init__(self, file: Path, held_out: HeldOut | None = None, epochs_per_step: float = 0.0) -> None:
        self.file, self.start, self.held_out, self.epochs_per_step = file, time.monotonic(), held_out, epochs_per_step
        self.trainer: Any = None
        self.measured: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.file.exists() and state.is_world_process_zero:
            rows = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in rows if row["step"] <= state.global_step]
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps
        if self.held_out is not None and (is_last or state.global_step % self.held_out.every == 0):
            self.measured = {"held_out_loss": self.held_out.loss(self.trainer)}
        if is_last or self.measured:  # the last step is logged, whatever log_every is
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        measured, self.measured = self.measured, {}  # in every process: they must agree on when to log
        if "loss" not in (logs or {}) or not state.is_world_process_zero:  # Trainer's summary at the end, of this start alone
            return
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self.start, 1), **(logs or {}), **measured}
        row["epoch"] = round(state.global_step * self.epochs_per_step, 4)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(
    model: Any,
    stage: Stage,
    data: Dataset,
    collator: Callable,
    output: Path,
    settings: LoopSettings,
    teach: Callable[[dict[str, Tensor]], Tensor] | None = None,
    held_out: HeldOut | None = None,
    adapters: frozenset[str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Train `stage` into `output`; started again, it goes on from the last checkpoint and ends with the same weights, those
    of the last checkpoint where it was the last step's.

    Returns a report: steps, seconds of this start, final loss, held-out loss, settings. Writes metrics.jsonl and loss.png.
    """
    check_counts(settings)
    check_answers_only(model, settings)
    output.mkdir(parents=True, exist_ok=True)
    print(trainable_table(freeze(model, stage.trains, adapters)), flush=True)
    if settings.compile:
        for layer in model.get_decoder().layers:  # one graph serves all layers
            layer.forward = torch.compile(layer.forward, dynamic=False)
    n_data: int = len(data)  # type: ignore[arg-type]
    lines = JsonLines(output / "metrics.jsonl", held_out, settings.images_per_step / max(1, n_data))
    trainer = StageTrainer(
        model=model,
        args=_arguments(output, settings, device),
        train_dataset=data,
        data_collator=collator,
        callbacks=[lines],
        teach=teach,
        distill_weight=settings.distill_weight,
        images_per_step=settings.images_per_step,
        answers_only=settings.answers_only,
    )
    lines.trainer = trainer
    checkpoint = last_whole_checkpoint(output)
    start = time.monotonic()
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        close_progress_bar(trainer)
    last = last_row(output / "metrics.jsonl")
    report = {
        "stage": stage.name,
        "steps": result.global_step,
        "seconds": round(time.monotonic() - start, 1),
        "resumed_from": checkpoint.name if checkpoint else None,
        "loss": last.get("loss"),
        "settings": asdict(settings),
    }
    if held_out is not None:
        report["held_out_loss"] = last.get("held_out_loss")
    if trainer.is_world_process_zero():
        plot_loss(output / "metrics.jsonl", output / "loss.png", title=stage.name)
    return report


def check_counts(settings: LoopSettings) -> None:
    """ValueError for a number of steps or images that is none."""
    for name in ("steps", "images_per_step", "save_every", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; give at least 1")


def check_answers_only(model: Any, settings: LoopSettings) -> None:
    """ValueError where `answers_only` does not go with the model or another setting."""
    if not settings.answers_only:
        return
    against = [name for name in ("label_smoothing_factor",) if (settings.extra or {}).get(name)]
    if settings.distill_weight:
        against.append("distill_weight, which follows a teacher's logits")
    if "answers_only" not in signature(type(model).forward).parameters:
        against.append(f"a {type(model).__name__}")
    if against:
        raise ValueError(
            f"answers_only computes no logits but the answers', and does not go with {against[0]}; leave one of the two out"
        )


def close_progress_bar(trainer: Trainer) -> None:
    """After an error the bar is still open, and the message would stand at its end."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.close()
            callback.training_bar = None


def last_row(metrics: Path) -> dict[str, Any]:
    """The last logged step (Trainer's own mean loss is wrong after a resume); {} if nothing was logged."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}


def images_per_pass(settings: LoopSettings, n_processes: int) -> int:
    """Images that one process sees in one forward pass. ValueError: they cannot be shared out evenly.

    >>> images_per_pass(LoopSettings(images_per_step=128, extra={"gradient_accumulation_steps": 2}), n_processes=8)
    8
    """
    parts = n_processes * int((settings.extra or {}).get("gradient_accumulation_steps", 1))
    if settings.images_per_step % parts:
        raise ValueError(
            f"images_per_step is {settings.images_per_step}, which cannot be shared out to {parts} (processes x "
            "gradient_accumulation_steps); give a multiple"
        )
    return settings.images_per_step // parts


def _arguments(output: Path, settings: LoopSettings, device: str = "auto") -> TrainingArguments:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; known: auto, cpu, cuda (CUDA_VISIBLE_DEVICES chooses one of several)")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; take cpu or auto")
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    if settings.precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is {settings.precision!r}; known: float32, bfloat16")
    options: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": settings.steps,
        "per_device_train_batch_size": images_per_pass(settings, int(os.environ.get("WORLD_SIZE", "1"))),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_learning_rate_share},
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "max_grad_norm": settings.clip,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": use_cpu,
        "dataloader_num_workers": settings.workers,
        "dataloader_pin_memory": not use_cpu,
        "remove_unused_columns": False,
        "report_to": "none",
    }
    extra = settings.extra or {}
    unknown = sorted(set(extra) - {field.name for field in fields(TrainingArguments)})
    if unknown:
        raise ValueError(f"extra: transformers' TrainingArguments has no {unknown[0]!r}")
    for name, setting in SET_BY.items():
        if name in extra:
            raise ValueError(f"extra: {name} is what {setting} says; leave it out of `extra`")
    arguments = TrainingArguments(**{**options, **extra})
    if arguments.n_gpu > 1:  # one process, several GPUs: Trainer would read images_per_step for each of them
        arguments._n_gpu = 1
    return arguments


def plot_loss(metrics: Path, picture: Path, title: str) -> None:
    """metrics.jsonl -> a picture of the loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    points = [(row["step"], row["loss"]) for row in rows if "loss" in row and math.isfinite(row["loss"])]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    if points:
        axes.plot(*zip(*points, strict=True), color="#1f5fa8", linewidth=1.2, label="training")
    held = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c05020", linewidth=1.2, markersize=3, label="held out")
        axes.legend()
    axes.set(title=f"loss: {title}", xlabel="step", ylabel="loss (nats per answer token)")
    axes.grid(alpha=0.3)
    save_figure(figure, picture, dpi=120)
    plt.close(figure)
