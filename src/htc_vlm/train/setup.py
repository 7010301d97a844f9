"""From a preset and a stage to a running loop: which model it starts from, and which data it reads.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from htc_vlm.data.collate import Collator
from htc_vlm.data.prompts import find_style
from htc_vlm.files import write_json
from htc_vlm.model import adapter
from htc_vlm.settings import typed
from htc_vlm.tiny.packed import PackedQuestions
from htc_vlm.train import presets
from htc_vlm.train.conversation_data import ConversationData
from htc_vlm.train.held_out import HeldOut
from htc_vlm.train.loop import check_answers_only, check_counts, images_per_pass, last_whole_checkpoint, run
from htc_vlm.train.lora import LoraSettings, add_adapters, merge_adapters, settings_from
from htc_vlm.train.packed_data import align_patches, held_out_sources, open_sources, packed_length
from htc_vlm.train.run_record import begin, check, finished, record_of
from htc_vlm.train.saving import save_rounded
from htc_vlm.train.stages import ADAPTER, COMPRESSOR, STAGES, Stage
from htc_vlm.train.teacher import logits_of_teacher


def train_stage(
    preset: dict[str, Any],
    stage_name: str,
    output: Path,
    start: str | None = None,
    cache: Path | None = None,
    data_root: Path | None = None,
    mgvq: str | None = None,
    teacher: str | None = None,
    vision: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Train one stage of a preset into `output` (resumed if it was begun); the trained model is saved in output/model,
    or in output/adapter where the stage's `trains` is `adapter`.

    start: checkpoint to start from (required but for the first stage); mgvq: the quantizer's weights; teacher:
    checkpoint whose answers are followed when the stage's distill_weight is above 0; data_root: where data sets lie; vision:
    CLIP folder, for original checkpoints without their tower; device: auto, cpu or cuda. ValueError where `output` was begun
    with other settings. A run that is done is left as it is, and its report returned.
    """
    stage = _stage(preset, stage_name)
    block = preset["stages"][stage_name]
    settings = presets.loop_settings(block)
    check_counts(settings)
    if settings.distill_weight and teacher is None:
        raise ValueError("distill_weight is set, so a teacher is needed: --teacher CHECKPOINT (the upper bound)")
    if teacher is not None and not settings.distill_weight:
        raise ValueError(f"--teacher {teacher} would not be asked: set stages.{stage_name}.distill_weight, or leave it out")
    lora = None if block.get("lora") is None else settings_from(block["lora"])
    files = {"start": start, "mgvq": mgvq, "teacher": teacher, "vision": vision}
    if data_root is not None:
        os.environ["HTC_VLM_DATA"] = str(data_root)
    record = record_of(preset, stage_name, files)
    check(output, record)
    report = finished(output, settings.steps)
    if report is not None:
        print(f"{output}: trained already ({settings.steps} steps); nothing to do", flush=True)
        return report
    conversations = any(part.get("json") for part in preset["data"])
    if conversations and cache is not None:
        raise ValueError(f"--cache {cache} would not be used: conversations' pictures are read as they come; leave it out")
    if conversations and block.get("curriculum"):
        raise ValueError(f"stages.{stage_name}.curriculum chooses nothing of conversations; leave it out")
    preset = {**preset, "n_text": block.get("n_text", preset.get("n_text"))}
    model, processor = _starting_model(preset, stage, block, start, mgvq, settings.seed, vision)
    check_answers_only(model, settings)
    n_held_out = typed("held_out", preset.get("held_out", 0), int)
    data: Dataset
    unseen: Dataset | None = None
    if conversations:
        every = ConversationData(preset, processor, settings.seed, output / "pictures-checked.json")
        data, unseen = every.split(n_held_out)
    else:
        folder = cache or output.parent / "cache"
        sources = open_sources(preset, model, folder, block.get("curriculum", {}))
        if start is None and "words" in preset and last_whole_checkpoint(output) is None:
            align_patches(preset, model, processor.tokenizer, sources, settings.seed)
        style = find_style(preset.get("prompt", "tiny"))
        processor.set_style(style)  # what packing writes
        pack = partial(
            PackedQuestions, n_text=int(preset["n_text"]), tokenizer=processor.tokenizer, image_text=processor.image_text(),
            seed=settings.seed, style=style,
        )  # fmt: skip
        data = pack(sources, n_samples=settings.steps * settings.images_per_step)
        if n_held_out:
            unseen = pack(held_out_sources(preset, model, folder, block, n_held_out), n_samples=n_held_out)
    collator = Collator(
        processor.tokenizer.pad_token_id, multiple_of=16 if conversations else packed_length(preset, processor)
    )
    teach = logits_of_teacher(teacher, model) if teacher is not None and settings.distill_weight else None
    held_out = None
    if unseen is not None:
        batch_size = images_per_pass(settings, int(os.environ.get("WORLD_SIZE", "1")))
        held_out = HeldOut(unseen, collator, batch_size, settings.measure_every or settings.save_every)
    is_adapter = ADAPTER in stage.trains
    if is_adapter:
        adapter.add(model, lora or LoraSettings())
    tuner, adapters = (None, None) if lora is None or is_adapter else add_adapters(model, lora, settings.seed)
    begin(output, record)
    report = run(model, stage, data, collator, output, settings, teach, held_out, adapters, device)
    if is_adapter:
        adapter.save(model, output / "adapter")
    else:
        save_rounded(model if tuner is None else merge_adapters(tuner), processor, output / "model")
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(output / "preset.json", preset, indent=1)
        write_json(output / "report.json", report, indent=1)
    return report


def _stage(preset: dict[str, Any], name: str) -> Stage:
    if name not in STAGES or name not in preset["stages"]:
        known = [stage for stage in STAGES if stage in preset["stages"]]
        raise ValueError(f"preset {preset.get('name')!r} has no stage {name!r}; it has: {', '.join(known)}")
    trains = preset["stages"][name].get("trains")
    stage = STAGES[name]
    if trains is None:
        return stage
    if trains == ADAPTER:
        trains = (ADAPTER, COMPRESSOR)
    one_or_more = [trains] if isinstance(trains, str) else trains
    prefixes: tuple[str, ...] = typed(f"stages.{name}.trains", one_or_more, tuple[str, ...])
    if not prefixes or not all(prefixes):
        raise ValueError(f"stages.{name}.trains is {trains!r}; give beginnings of weights' names, e.g. {COMPRESSOR}")
    return Stage(name, prefixes, stage.starts_from, stage.compresses)


def _starting_model(
    preset: dict[str, Any], stage: Stage, block: dict[str, Any], start: str | None, mgvq: str | None, seed: int,
    vision: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    from htc_vlm.model.add_compressor import with_compressor
    from htc_vlm.model.loading import find

    if start is None:
        if stage.compresses or "base" in preset:
            raise ValueError(f"stage {stage.name!r} starts from a trained checkpoint; give it with --start")
        if block.get("compressor", {"name": "none"}) != {"name": "none"}:
            raise ValueError(f"stage {stage.name!r} has a compressor, but a new model has none; give --start CHECKPOINT")
        for option, given in (("mgvq", mgvq), ("vision", vision)):
            if given is not None:
                raise ValueError(f"--{option} {given} would not be read: a new model is made; leave it out, or give --start")
        return presets.build_tiny(preset, tower=os.environ.get("HTC_VLM_TOWER"), seed=seed)
    torch.manual_seed(seed)
    compressor = block.get("compressor", {"name": "none"})
    return with_compressor(find(start), compressor, mgvq, dtype=torch.float32, vision=vision)


