"""The fast trainer's loop: from a run's settings to a checkpoint, resumable at every saved step.

Source:  ours; the loss is HTC-VLM's Eq. 9 on the answers, as in train/loop.py.
Differs: answers may be weighted by the kind of their question, and `turn_loss` adds a second loss, for training only: a
         linear layer reads the turn of a thing off each of its patches' states before the last layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htc_vlm.files import write_json
from htc_vlm.model import adapter
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.loading import find
from htc_vlm.settings import make
from htc_vlm.tiny.packed import Source
from htc_vlm.train import presets
from htc_vlm.train.loop import plot_loss
from htc_vlm.train.packed_data import align_patches
from study.fast_trainer import state
from study.fast_trainer.data import NO_TURN, Batch, Pictures, batch, cells_of_patches, training_pictures, watched_pictures
from study.fast_trainer.measure import right_answers
from study.fast_trainer.model import FastModel, method_of
from study.fast_trainer.settings import Run
from study.fast_trainer.tree import NOTHING
from study.fast_trainer.weights import export, fast_model
from study.jobs import needs_quantizer, quantizer_of


def train(run: Run, folder: Path, cache: Path, data_root: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Train into `folder` -> the report. It leaves model/ (a checkpoint; with `lora` adapter/), state.pt, metrics.jsonl,
    report.json and loss.png.

    cache: the tower's features, codes and questions, computed where they are missing. ValueError where the folder holds a run
    and `resume` is not set, or one with other settings.
    """
    method = method_of(run.compressor)
    state.check(folder, run, resume)
    folder.mkdir(parents=True, exist_ok=True)
    if data_root is not None:
        os.environ["HTC_VLM_DATA"] = str(data_root)
    library, processor = starting_model(run, cache)
    tokenizer = processor.tokenizer
    parts = [] if state.is_done(folder, run) else run.parts
    sets = [training_pictures(run, part, library, tokenizer, cache) for part in parts]
    watched = {name: watched_pictures(one, library, tokenizer, cache) for name, one in run.watch.items()}
    if run.start is None and not (folder / state.STATE).is_file():
        align(run, library, tokenizer, sets[0])
    model = fast_model(library, reads_turn=run.turn_loss > 0, seed=run.seed)
    loop(run, folder, model, sets, watched, tokenizer.eos_token_id)
    export(model, library, processor, folder / ("model" if run.lora is None else "adapter"))
    note = state.read(folder)["settings"]["note"]
    right = {name: right_answers(model, one, method.n_entries) for name, one in watched.items()}
    report = report_of(replace(run, note=run.note or note), folder, right)
    plot_loss(folder / state.METRICS, folder / "loss.png", title=run.title or run.compressor["name"])
    write_json(folder / state.REPORT, report, indent=1)
    return report


def starting_model(run: Run, work: Path) -> tuple[Any, Any]:
    """(library model, processor) that a run starts from, with its compressor."""
    torch.manual_seed(run.seed)
    lora = None if run.lora is None else _lora_of(run)
    if run.start is None:
        if run.compressor != {"name": "none"}:
            raise ValueError(f"a new model has no compressor: give `start`, a checkpoint, to train {run.compressor['name']}")
        preset = presets.read(presets.find(run.preset))
        return presets.build_tiny(preset, os.environ.get("HTC_VLM_TOWER"), run.seed)
    mgvq = None
    if needs_quantizer(run.compressor):
        if run.mgvq is None:
            raise ValueError("this method reads a code: give mgvq, a quantizer or a checkpoint that carries one")
        mgvq = quantizer_of(run.mgvq, work)
    model, processor = with_compressor(find(run.start), run.compressor, mgvq, dtype=torch.float32)
    if lora is not None:
        adapter.add(model, lora)
    return model, processor


def _lora_of(run: Run) -> adapter.LoraSettings:
    """A run's `lora`; ValueError for what this trainer does not know."""
    lora, usual = make(adapter.LoraSettings, run.lora or {}, where="lora: "), adapter.LoraSettings()
    if run.start is None:
        raise ValueError("lora: an adapter needs a base that stays as it is: give `start`, a checkpoint")
    for name in ("dropout", "modules"):
        if getattr(lora, name) != getattr(usual, name):
            raise ValueError(f"lora: {name} is {getattr(lora, name)!r}; the fast trainer knows {getattr(usual, name)!r} only")
    return lora


def align(run: Run, library: Any, tokenizer: Any, pictures: Pictures) -> None:
    """A new model's projector and word embedding, by the preset's `words` block."""
    preset = presets.read(presets.find(run.preset))
    if "words" not in preset:
        return
    align_patches(preset, library, tokenizer, [Source(pictures.task, pictures.cache, lambda *_: [], share=1.0)], run.seed)


def optimizer_of(run: Run, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; vectors do not decay."""
    learns = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in learns if weight.ndim > 1]
    vectors = [weight for weight in learns if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": run.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, run.beta2), fused=True)


def loop(
    run: Run, folder: Path, model: FastModel, sets: list[Pictures], watched: Mapping[str, Pictures], end_id: int
) -> None:
    """All steps that are left."""
    optimizer = optimizer_of(run, model)
    progress = state.restore(folder, model, optimizer)
    if progress.step >= run.steps:
        return
    forward = torch.compile(model, dynamic=False) if run.compile else model
    cells = cells_of_patches(sets[0].cache.meta.n_patches)
    before, began = progress.seconds, time.perf_counter()
    for step in range(progress.step, run.steps):
        seen, rng = batch(run, sets, step, end_id)
        try:
            loss = one_step(run, model, forward, optimizer, seen, int(rng.choice(model.method.budgets)), step, cells)
        except FloatingPointError as error:
            raise ValueError(f"{error}; lower the learning rate. {folder} keeps its state") from error
        if seen.is_first:
            progress.losses.append(loss)
        progress.step, progress.seconds = step + 1, before + time.perf_counter() - began
        keep_record(run, folder, model, watched, progress)
        if progress.step % run.save_every == 0 or progress.step == run.steps:
            state.save(folder, run, progress, model, optimizer)


def one_step(
    run: Run, model: FastModel, forward: Callable[..., tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, seen: Batch,
    n_entries: int, step: int, cells: Tensor,
) -> float:  # fmt: skip
    """Move the weights once -> mean loss of the answers, nats per token. FloatingPointError where it is not finite."""
    trees = seen.trees
    logits, patches = forward(seen.features, seen.code, trees.ids, trees.depth, trees.visible, trees.at, n_entries)
    plain, weighted = answer_loss(logits, seen, run.loss_weights)
    if seen.turns is not None:
        weighted = weighted + run.turn_loss * turn_loss(model, patches, seen.turns, cells)
    if not torch.isfinite(weighted):
        raise FloatingPointError(f"the loss is {weighted.item()} at step {step}")
    optimizer.zero_grad(set_to_none=True)
    weighted.backward()
    nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.grad is not None], run.clip)
    for group in optimizer.param_groups:
        group["lr"] = run.learning_rate_at(step)
    optimizer.step()
    return float(plain.item())


def answer_loss(logits: Tensor, seen: Batch, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """(mean loss of all answers, the same weighted by kind), nats per answer token. Only the first data set is weighted."""
    each = F.cross_entropy(logits.flatten(0, 1), seen.trees.target.flatten(), ignore_index=NOTHING, reduction="none")
    plain = each.detach().sum() / seen.trees.n_answers
    weight = torch.zeros(seen.trees.target.shape)
    for row, kinds in enumerate(seen.trees.kinds):
        weight[row, : len(kinds)] = torch.tensor([weights.get(kind, 1.0) if seen.is_first else 1.0 for kind in kinds])
    return plain, (each * weight.flatten()).sum() / weight.sum()


def turn_loss(model: FastModel, patches: Tensor, turns: Tensor, cells: Tensor) -> Tensor:
    """How well the turn of the thing in a patch's quarter is read off the patch, nats per patch of a thing that turns."""
    wanted = turns[:, cells]  # (B, P)
    each = F.cross_entropy(model.turn_head(patches).flatten(0, 1), wanted.flatten(), ignore_index=NO_TURN, reduction="sum")
    return each / (wanted != NO_TURN).sum().clamp_min(1)


def keep_record(
    run: Run, folder: Path, model: FastModel, watched: Mapping[str, Pictures], progress: state.Progress
) -> None:
    """Lines of metrics.jsonl that are due after this step."""
    at = {"step": progress.step, "seconds": round(progress.seconds, 1)}
    is_last = progress.step == run.steps
    if (progress.step % run.log_every == 0 or is_last) and progress.losses:
        loss = round(sum(progress.losses) / len(progress.losses), 5)
        rate = run.learning_rate_at(progress.step - 1)
        state.note(folder, at | {"loss": loss, "learning_rate": rate})
        progress.losses.clear()
    if watched and (progress.step % run.measure_every == 0 or is_last):
        right = {name: right_answers(model, one, model.method.n_entries) for name, one in watched.items()}
        state.note(folder, at | {"right": right})
        scores = ", ".join(f"{name} {one['score']:.1f}" for name, one in right.items())
        print(f"step {progress.step}, {progress.seconds:.0f} s: right answers in percent: {scores}", flush=True)


def report_of(run: Run, folder: Path, right: dict[str, Any]) -> dict[str, Any]:
    """What report.json says of a run that is done."""
    rows = state.record(folder)
    seconds, losses = rows[-1]["seconds"] if rows else 0.0, [row["loss"] for row in rows if "loss" in row]
    return {
        "steps": run.steps,
        "seconds": seconds,
        "images_per_second": round(run.steps * run.parts[0].images_per_step / seconds, 2) if seconds else None,
        "loss": losses[-1] if losses else None,
        "right": right,
        "settings": asdict(run),
    }
