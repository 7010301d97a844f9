"""From a preset and a stage to a running loop: which model it starts from, and which data it reads.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from htc_vlm.data.collate import Collator, Sample
from htc_vlm.data.conversations import Record, encode, load_conversations
from htc_vlm.data.images import ImageError, load_for_model
from htc_vlm.data.prompts import TINY, VICUNA_V1, find_style
from htc_vlm.files import replacing_folder, write_json
from htc_vlm.model import adapter
from htc_vlm.settings import typed
from htc_vlm.tiny.align_patches import align_words
from htc_vlm.tiny.features import FeatureCache, fill, meta_for
from htc_vlm.tiny.packed import PackedQuestions, Source, codes_of
from htc_vlm.train import presets
from htc_vlm.train.held_out import HeldOut, hold_out
from htc_vlm.train.loop import images_per_pass, last_whole_checkpoint, run
from htc_vlm.train.lora import LoraSettings, add_adapters, merge_adapters, settings_from
from htc_vlm.train.run_record import begin, check, finished, record_of
from htc_vlm.train.stages import ADAPTER, COMPRESSOR, STAGES, Stage

CODE_PICTURE_SIZE = 160


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
    lora = None if block.get("lora") is None else settings_from(block["lora"])
    files = {"start": start, "mgvq": mgvq, "teacher": teacher, "vision": vision}
    record = record_of(preset, stage_name, files)
    check(output, record)
    report = finished(output, settings.steps)
    if report is not None:
        print(f"{output}: trained already ({settings.steps} steps); nothing to do", flush=True)
        return report
    preset = {**preset, "n_text": block.get("n_text", preset.get("n_text"))}
    if data_root is not None:
        os.environ["HTC_VLM_DATA"] = str(data_root)
    model, processor = _starting_model(preset, stage, block, start, mgvq, settings.seed, vision)
    if settings.distill_weight and teacher is None:
        raise ValueError("distill_weight is set, so a teacher is needed: --teacher CHECKPOINT (the upper bound)")
    n_held_out = typed("held_out", preset.get("held_out", 0), int)
    conversations = any(part.get("json") for part in preset["data"])
    data: Dataset
    unseen: Dataset | None = None
    if conversations:
        every = ConversationData(preset, processor, settings.seed, output / "pictures-checked.json")
        data, unseen = every.split(n_held_out)
    else:
        folder = cache or output.parent / "cache"
        sources = _sources(preset, model, folder, block.get("curriculum", {}))
        if start is None and "words" in preset and last_whole_checkpoint(output) is None:
            _align_words(preset, model, processor, sources, settings.seed)
        processor.set_style(TINY)  # what packing writes
        pack = partial(
            PackedQuestions, n_text=int(preset["n_text"]), tokenizer=processor.tokenizer, image_text=processor.image_text(),
            seed=settings.seed,
        )  # fmt: skip
        data = pack(sources, n_samples=settings.steps * settings.images_per_step)
        if n_held_out:
            unseen = pack(_held_out_sources(preset, model, folder, block, n_held_out), n_samples=n_held_out)
    collator = Collator(
        processor.tokenizer.pad_token_id, multiple_of=16 if conversations else _packed_length(preset, processor)
    )
    teach = _teach(teacher, model) if teacher is not None and settings.distill_weight else None
    held_out = None
    if unseen is not None:
        batch_size = images_per_pass(settings, int(os.environ.get("WORLD_SIZE", "1")))
        held_out = HeldOut(unseen, collator, batch_size, settings.measure_every or settings.save_every)
    is_adapter = ADAPTER in stage.trains
    if is_adapter:
        adapter.add(model, adapter.LoraSettings(**asdict(lora or LoraSettings())))
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
    if trains == ADAPTER:
        trains = (ADAPTER, COMPRESSOR)
    return stage if trains is None else Stage(name, tuple(trains), stage.starts_from, stage.compresses)


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
        return presets.build_tiny(preset, tower=os.environ.get("HTC_VLM_TOWER"), seed=seed)
    torch.manual_seed(seed)
    compressor = block.get("compressor", {"name": "none"})
    return with_compressor(find(start), compressor, mgvq, dtype=torch.float32, vision=vision)


def _packed_length(preset: dict[str, Any], processor: Any) -> int:
    """One fixed length for all batches, so that a compiled layer is compiled once."""
    n_image = len(processor.tokenizer.encode(processor.image_text(), add_special_tokens=False))
    return n_image + int(preset["n_text"])


def _sources(
    preset: dict[str, Any], model: Any, folder: Path, curricula: dict[str, list[dict[str, Any]]], split: str = "train"
) -> list[Source]:
    """Open or fill the feature caches of a preset's tasks."""
    tower = model.model.vision_tower
    encode_code = getattr(model.model.compressor, "encode", None)
    sources = []
    for options in preset["data"]:
        part = presets.DataPart(**options)
        curriculum = curricula.get(part.task, part.curriculum)
        module = presets.task_module(part.task)
        if part.images < 1:
            raise ValueError(f"{part.task}: empty data set: `images` is {part.images}; say how many to train on")
        ids = module.images(split)[: part.images]
        if len(ids) < part.images:
            name = "training split" if split == "train" else f"split {split!r}"
            raise ValueError(f"{part.task}: {part.images} images asked for, the {name} has {len(ids)}")
        name = f"{part.task}-train" if split == "train" else f"{part.task}-{split}-{part.images}"
        cache = FeatureCache(folder / name, meta_for(tower, part.images, CODE_PICTURE_SIZE))
        if cache.missing() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"{part.task}: the tower's features are not all in {folder} yet, and several processes would write over one "
                "another; run the command without torchrun first, for one step (--set stages.STAGE.steps=1, other --output)"
            )
        if cache.missing():
            print(
                f"{part.task}: computing the tower's features of {len(cache.missing())} images (resumable)", flush=True
            )
            fill(cache, tower, partial(_picture, module, ids))
        codes = None
        if encode_code is not None and model.model.compressor.has_code:
            stem = part.task if split == "train" else name
            codes = codes_of(cache, encode_code, folder / f"{stem}-codes-{code_key(model.model.compressor)}.npy")
        ask, simple_first = _asker(module, ids, curriculum), _simple_first(module, ids, curriculum)
        sources.append(Source(part.task, cache, ask, part.share, codes, simple_first))
    return sources


def _held_out_sources(
    preset: dict[str, Any], model: Any, folder: Path, block: dict[str, Any], n_pictures: int
) -> list[Source]:
    """Pictures of the validation splits, asked about as in the last block of each curriculum."""
    curricula = block.get("curriculum", {})
    parts, last = [], {}
    for options in preset["data"]:
        part = presets.DataPart(**options)
        blocks = curricula.get(part.task, part.curriculum)
        last[part.task] = [{k: v for k, v in blocks[-1].items() if k != "max_things"}] if blocks else []
        n = min(n_pictures, len(presets.task_module(part.task).images("val")))
        parts.append({"task": part.task, "share": part.share, "images": n})
    return _sources({**preset, "data": parts}, model, folder, last, split="val")


def _align_words(preset: dict[str, Any], model: Any, processor: Any, sources: list[Source], seed: int) -> None:
    """The preset's `words` block, on the cached features of its task."""
    settings = presets.word_settings(preset["words"])
    source = next((source for source in sources if source.name == settings.task), None)
    module = presets.task_module(settings.task)
    if source is None or not hasattr(module, "patch_words"):
        able = [part["task"] for part in preset["data"] if hasattr(presets.task_module(part["task"]), "patch_words")]
        raise ValueError(f"words.task is {settings.task!r}; tasks in this preset that know a patch's words: {', '.join(able)}")
    ids, n_side = module.images("train"), round(source.cache.meta.n_patches**0.5)
    loss = align_words(
        model, source.cache, lambda i: module.patch_words(ids[i], n_side), processor.tokenizer.get_vocab(), settings, seed
    )
    print(f"patches aligned with words: {settings.steps} steps, loss {loss:.3f} nats per word", flush=True)


def _picture(module: Any, ids: Sequence[str], number: int) -> Any:
    return module.picture(ids[number])


def _simple_first(
    module: Any, ids: Sequence[str], curriculum: Sequence[dict[str, Any]]
) -> list[tuple[float, np.ndarray]]:
    """For the blocks of a curriculum up to the last with `max_things`: (until, numbers of the images it allows)."""
    n_blocks = max((i + 1 for i, block in enumerate(curriculum) if "max_things" in block), default=0)
    if not n_blocks:
        return []
    counts = np.array([module.n_things(image_id) for image_id in ids])
    out = [
        (float(block["until"]), np.flatnonzero(counts <= block.get("max_things", counts.max())))
        for block in curriculum[:n_blocks]
    ]
    if any(len(allowed) == 0 for _, allowed in out):
        raise ValueError("curriculum: max_things leaves no image; raise it")
    return out


def code_key(compressor: Any) -> str:
    """What codes depend on, as part of a file name: the quantizer's weights and what is taken of it."""
    digest = hashlib.sha256()
    for name, value in sorted(compressor.quantizer.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    if compressor.quantizer.name != "mgvq":  # one without weights is told from another by its settings
        digest.update(json.dumps(compressor.settings.quantizer, sort_keys=True).encode())
    kind = "latents" if compressor.settings.anchor_source == "latents" else "quantized"
    return f"{kind}-{compressor.settings.quantizer['image_size']}-{digest.hexdigest()[:12]}"


def _asker(
    module: Any, ids: Sequence[str], curriculum: Sequence[dict[str, Any]]
) -> Callable[[int, int, int, float], list[tuple[str, str]]]:
    """Questions about image number i, their kinds drawn by the weights that the curriculum has at this point of the run."""

    def ask(image: int, n: int, seed: int, progress: float) -> list[tuple[str, str]]:
        block = next((block for block in curriculum if progress < block["until"]), {})
        extra = {name: block[key] for name, key in (("weights", "kinds"), ("places", "places")) if key in block}
        return [(question.text, question.answer) for question in module.sample_questions(ids[image], n, seed, **extra)]

    return ask


def _teach(path: str, student: Any) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function: a batch -> the teacher's logits at the supervised tokens, in the same order as the student's."""
    from htc_vlm.model.loading import load
    from htc_vlm.model.modeling import sizes_of

    teacher = load(path)[0].requires_grad_(False)
    if teacher.model.compressor.name != "none":
        raise ValueError(f"the teacher must be uncompressed, {path} uses {teacher.model.compressor.name!r}")
    image_id, bottleneck_id = student.config.image_token_id, student.config.bottleneck_token_id
    n_patches = sizes_of(teacher.config).n_patches
    if teacher.config.text_config.vocab_size != student.config.text_config.vocab_size:
        raise ValueError(f"the teacher {path} has another vocabulary than the student; distil from the same language model")

    @torch.no_grad()
    def teach(batch: dict[str, Tensor]) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        teacher.to(ids.device)
        is_image = (ids == image_id) | (ids == bottleneck_id)
        n_image = student.model.compressor.n_visual(n_patches) + student.model.compressor.n_bottleneck
        if not bool((is_image[:, :n_image].all(1) & (is_image.sum(1) == n_image)).all()):
            raise ValueError("distillation needs exactly one image in front of each sample")
        prefix = ids.new_full((ids.shape[0], n_patches), image_id)

        def swap(tensor: Tensor, value: int) -> Tensor:
            return torch.cat((torch.full_like(prefix, value), tensor[:, n_image:]), dim=1)

        others: dict[str, Tensor] = {name: batch[name] for name in ("patch_features", "pixel_values") if name in batch}
        if "question_ids" in batch:
            others["question_ids"] = swap(batch["question_ids"], 0)
        out = teacher(
            input_ids=torch.cat((prefix, ids[:, n_image:]), dim=1),
            attention_mask=swap(batch["attention_mask"], 1),
            **others,
        )
        return out.logits[:, :-1][swap(labels, -100)[:, 1:] != -100]

    return teach


def save_rounded(model: Any, processor: Any, folder: Path) -> None:
    """Save in bfloat16: half the bytes; loaded as float32 it gives the same numbers everywhere. The quantizer keeps its
    precision: a rounded codebook would change codes. In a distributed run every process must call this: what is sharded is
    gathered, and the first process writes."""
    state = _whole_state(model)
    if state is not None:
        rounded = {
            name: value.to(torch.bfloat16) if value.is_floating_point() and ".quantizer." not in name else value
            for name, value in state.items()
        }
        with replacing_folder(folder) as partial_folder:
            _write_model(model, rounded, processor, partial_folder)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _write_model(model: Any, state: dict[str, Tensor], processor: Any, folder: Path) -> None:
    # With its sharding in the configuration, save_pretrained would gather again, alone, and wait for the others for ever.
    sharding = model.config.__dict__.pop("distributed_config", None)
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        if sharding is not None:
            model.config.distributed_config = sharding
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    config.pop("use_cache", None)  # Trainer's own setting, which would make generate slow
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("_name_or_path", None)  # where the weights once lay
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(folder)


def _whole_state(model: Any) -> dict[str, Tensor] | None:
    """Every weight and buffer in full, on the CPU where they were sharded; None in all processes but the first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        whole: dict[str, Tensor] = model.state_dict()
        return whole
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    gathered: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(gathered) if torch.distributed.get_rank() == 0 else None


class ConversationData(Dataset):
    """LLaVA's conversation JSON with its images, processed when asked for: the way to train at real size.

    The style is the preset's `prompt`; without one the processor's own, or LLaVA-1.5's where it has none. The processor is set
    to it, so that the model is saved with it and asked in it.
    Shuffled once, by `seed`. Every picture is decoded before training starts, and all broken ones are named in one
    ValueError; `checked` remembers that, so that a resumed run starts at once.
    """

    def __init__(self, preset: dict[str, Any], processor: Any, seed: int = 0, checked: Path | None = None) -> None:
        self.processor = processor
        name = preset.get("prompt")
        self.style = (processor.style or VICUNA_V1) if name is None else find_style(name)
        processor.set_style(self.style)
        records: list[Record] = []
        for options in preset["data"]:
            part = presets.DataPart(**options)
            if part.json is None:
                raise ValueError("conversations and packed tasks cannot be mixed in one preset")
            records += load_conversations(part.json, part.image_folder)
        _refuse_placeholders(records, processor)
        _refuse_broken(records, checked)
        self.records = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]

    def split(self, n_held_out: int) -> tuple[ConversationData, ConversationData | None]:
        """(what is trained on, the samples held out); no picture is in both."""
        if not n_held_out:
            return self, None
        parts = copy.copy(self), copy.copy(self)
        parts[0].records, parts[1].records = hold_out(self.records, n_held_out)
        return parts

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sample:
        record = self.records[number]
        encoded = encode(record, self.processor.tokenizer, self.processor.image_text(), self.style)
        if not record.images:
            return Sample(encoded)
        pictures = [load_for_model(path) for path in record.images]
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return Sample(encoded, {"pixel_values": pixels})


def _refuse_placeholders(records: list[Record], processor: Any) -> None:
    """ValueError for samples whose text has the bottleneck token in it, which would be taken for a picture's."""
    mark = processor.bottleneck_token
    wrong = [record.id for record in records if any(mark in turn.question + turn.answer for turn in record.turns)]
    if wrong:
        raise ValueError(f"sample {wrong[0]!r} contains {mark}, which stands for a picture inside the model; remove it")


def _refuse_broken(records: list[Record], checked: Path | None) -> None:
    """ValueError that lists every picture that cannot be used, unless `checked` says that these files were good."""
    files = sorted({image for record in records for image in record.images})
    listing = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    key = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    if checked is not None and checked.exists() and json.loads(checked.read_text()) == key:
        return
    broken = []
    for file in files:
        try:
            load_for_model(file)
        except ImageError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(f"{len(broken)} of {len(files)} pictures cannot be used; repair or remove them: {'; '.join(broken)}")
    if checked is not None:
        checked.parent.mkdir(parents=True, exist_ok=True)
        write_json(checked, key)
