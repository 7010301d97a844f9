"""One row of a study, from its YAML file to its result file: train what is missing, evaluate, write.

Source:  docs/design.md (one experiment = one YAML = one JSON per seed).
Differs: nothing known.

All rows share the frozen tower's features (`cache`), the order of the data (by the seed) and the weights they start
from. A result is never overwritten: one that was made under another config is an error that says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import htc_vlm
from htc_vlm import compressors
from htc_vlm.eval.run_info import provenance
from htc_vlm.files import write_json
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.answering import Answerer
from htc_vlm.model.loading import find, load
from htc_vlm.ops import schedules
from htc_vlm.tiny.features import FeatureCache, fill, meta_for
from htc_vlm.tiny.packed import codes_of
from htc_vlm.tokens import equivalent_tokens
from htc_vlm.train import presets
from htc_vlm.train.setup import CODE_PICTURE_SIZE, code_key, train_stage
from study import answers, evaluating
from study.definitions import Experiment
from study.given_quantizer import needs_quantizer, quantizer_of

# Settings of the loop that change no weight.
WITHOUT_EFFECT = ("seed", "save_every", "log_every", "workers")


@dataclass(frozen=True)
class Study:
    """Where things lie. work: runs in progress; cache: features; data: the data sets; results: what is committed."""

    work: Path
    results: Path
    cache: Path
    data: Path
    device: str
    batch_size: int


@dataclass(frozen=True)
class Job:
    """One experiment with one seed. config: all that its numbers depend on; impossible: why the method refuses."""

    experiment: Experiment
    seed: int
    config: dict[str, Any]
    impossible: str | None = None

    @property
    def name(self) -> str:
        """table/row/seed"""
        return f"{self.experiment.name}/{self.seed}"

    def result_file(self, study: Study) -> Path:
        return study.results / self.experiment.table / self.experiment.row / f"{self.seed}.json"

    def folder(self, study: Study) -> Path:
        return study.work / self.experiment.table / self.experiment.row / str(self.seed)


# ------------------------------------------------------------------------------------------------ config
def checkpoint_identity(name: str | None) -> dict[str, str] | None:
    """{"checkpoint": as named, "sha256": of its weights}; None for no checkpoint."""
    if name is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(find(name).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return {"checkpoint": _portable(name), "sha256": digest.hexdigest()[:16]}


def _portable(name: str) -> str:
    """A name or relative path as it is; of an absolute path the last two parts; of what the study keeps, its name."""
    path = Path(name)
    if path.parent.parts[-2:] == ("study", "checkpoints"):  # once shipped under this name
        return path.name
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def stage_preset(experiment: Experiment, seed: int) -> dict[str, Any]:
    """The experiment's preset with its one stage as this experiment trains it."""
    preset = presets.read(presets.find(experiment.preset))
    stage = str(experiment.stage)
    if stage not in preset["stages"]:
        raise ValueError(f"preset {experiment.preset!r} has no stage {stage!r}; it has: {', '.join(preset['stages'])}")
    block = {**preset["stages"][stage], **experiment.training, "compressor": experiment.compressor, "seed": seed}
    data = preset["data"] if experiment.data is None else experiment.data
    return {**preset, "data": data, "stages": {stage: block}}


def training_config(experiment: Experiment, seed: int, work: Path) -> dict[str, Any]:
    """All that the weights depend on, beside start and seed."""
    preset = stage_preset(experiment, seed)
    block = preset["stages"][experiment.stage]
    settings = asdict(presets.loop_settings(block))
    out: dict[str, Any] = {
        "preset": experiment.preset,
        "stage": experiment.stage,
        "data": preset["data"],
        "n_text": block.get("n_text", preset.get("n_text")),
        "curriculum": block.get("curriculum"),
        "trains": block.get("trains"),
        "settings": {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT},
        "teacher": checkpoint_identity(experiment.teacher) if settings["distill_weight"] else None,
        "quantizer": None,
    }
    if settings["distill_weight"] and experiment.teacher is None:
        raise ValueError("distill_weight is set, so a teacher is needed: the name of an uncompressed checkpoint")
    if needs_quantizer(experiment.compressor):
        if experiment.mgvq is None:
            raise ValueError("this method reads a code: give mgvq, a quantizer or a checkpoint that carries one")
        out["quantizer"] = code_identity(quantizer_of(experiment.mgvq, work))
    if experiment.start is None:
        out |= {name: preset.get(name) for name in ("vision", "text", "words")}
    return out


def code_identity(path: Path) -> str:
    """Hash of a quantizer's file."""
    file = path / "model.safetensors" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def make_job(experiment: Experiment, seed: int, study: Study) -> Job:
    """Everything checked that can be before a model is trained. ValueError names the experiment and what is wrong."""
    try:
        method, impossible = resolved_method(experiment, seed, study)
        compressors.build(**experiment.compressor)
        if experiment.stage is None and experiment.start is None:
            raise ValueError("nothing to evaluate: give start (a checkpoint) or stage (to train)")
        if experiment.method is not None and experiment.stage is not None:
            raise ValueError("`method` needs no training; leave out stage")
        if not experiment.tasks:
            raise ValueError("no tasks to evaluate")
        config = {
            "start": checkpoint_identity(experiment.start),
            "compressor": experiment.compressor,
            "method": method,
            "training": None if experiment.stage is None else training_config(experiment, seed, study.work),
            "tasks": {name: asdict_of(tests) for name, tests in task_sets(experiment, study).items()},
        }
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{experiment.name}: {error}") from error
    return Job(experiment, seed, json.loads(json.dumps(config)), impossible)


def asdict_of(tests: evaluating.TaskSet) -> dict[str, Any]:
    """What a config says of a test set."""
    return {"task": tests.task, "split": tests.split, "n_questions": len(tests.items), "questions_sha256": tests.sha256}


def task_sets(experiment: Experiment, study: Study) -> dict[str, evaluating.TaskSet]:
    """The experiment's tasks, loaded."""
    return {
        name: evaluating.task_set(name, task["task"], task.get("split"), task.get("limit"), str(study.data))
        for name, task in experiment.tasks.items()
    }


def resolved_method(experiment: Experiment, seed: int, study: Study) -> tuple[dict[str, Any] | None, str | None]:
    """The applied method with its settings spelled out, and why it is impossible on this model (None: it is not).

    ValueError for a method or setting that does not exist: that is a slip in the file, not a limit of the method.
    """
    if experiment.method is None:
        return None, None
    given = dict(experiment.method)
    name, share = given.pop("name"), given.pop("share", None)
    known = [setting.name for setting in fields(compressors.COMPRESSORS.get(name).Settings)]  # type: ignore[attr-defined]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; known: share, {', '.join(known)}")
    if "seed" in known:
        given.setdefault("seed", seed)
    named = {"name": name, **({} if share is None else {"share": share}), **given}
    n_patches, n_layers = sizes(str(experiment.start))
    try:
        if share is not None:
            tokens = tokens_of_share(share, n_patches)
            given = {**compressors.get(name).for_budget(tokens, n_patches, n_layers), **given}
        compressors.build(name, **given).schedule(n_patches, n_layers)
    except ValueError as error:
        return named, str(error)
    return {"name": name, **given}, None


def tokens_of_share(share: int, n_patches: int) -> int:
    """As many tokens of n_patches as `share` of 576; ValueError where that is no whole number of at least 1.

    >>> [tokens_of_share(share, 36) for share in (192, 128, 64)]
    [12, 8, 4]
    """
    tokens, rest = divmod(share * n_patches, schedules.PUBLISHED_PATCHES)
    if rest or not tokens:
        raise ValueError(f"{share} of {schedules.PUBLISHED_PATCHES} is no whole number of this model's {n_patches} patches")
    return tokens


def sizes(checkpoint: str) -> tuple[int, int]:
    """(P, layers) of a checkpoint."""
    from htc_vlm.applied.hf_compat import n_patches
    from htc_vlm.model.configuration import HtcVlmConfig

    config = HtcVlmConfig.from_pretrained(find(checkpoint))
    return n_patches(config), int(config.text_config.num_hidden_layers)


# ------------------------------------------------------------------------------------------------ state
def is_done(job: Job, study: Study) -> bool:
    """Is the result there? ValueError when it, or the run in progress, was made under another config."""
    for file in (job.result_file(study), job.folder(study) / "config.json"):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            before = found["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: damaged ({error}); remove it to build it again") from error
        different = answers.differences(before, job.config)
        if different:
            what = "the result" if file == job.result_file(study) else "the run"
            raise ValueError(
                f"{file}: {what} was made under another config: {'; '.join(different)}. Nothing is overwritten: "
                f"keep the settings, or choose another --output and --work, or remove it by hand"
            )
    return job.result_file(study).is_file()


def is_trained(folder: Path, steps: int) -> bool:
    """Did train_stage come to its end here? (preset.json is what it writes last)"""
    if not (folder / "preset.json").is_file() or not (folder / "report.json").is_file():
        return False
    return bool(json.loads((folder / "report.json").read_text())["steps"] == steps)


def seconds_trained(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all starts of a run from its metrics.jsonl, whose clock begins anew at each start.

    >>> seconds_trained([{"seconds": 5.0}, {"seconds": 9.0}, {"seconds": 4.0}, {"seconds": 6.0}])
    15.0
    """
    total, last = 0.0, 0.0
    for row in rows:
        if row["seconds"] < last:
            total += last
        last = row["seconds"]
    return total + last


# ------------------------------------------------------------------------------------------------ prepare
def prepare(jobs: Sequence[Job], study: Study) -> None:
    """What all rows share, computed once and before any of them: questions, blind baselines, features, codes."""
    os.environ["HTC_VLM_DATA"] = str(study.data)
    seen: set[str] = set()
    for job in jobs:
        key = json.dumps([job.experiment.start, job.experiment.compressor, job.config["training"], job.config["tasks"]])
        if key in seen or job.impossible:
            continue
        seen.add(key)
        model, _ = starting_model(job, study)
        for tests in task_sets(job.experiment, study).values():
            evaluating.with_baselines(tests, study.results)
            evaluating.features_of(tests, model.model.vision_tower, study.cache)
            evaluating.codes_of_tasks(tests, model, study.cache)
        if job.experiment.stage is not None:
            _fill_training(job, model, study)


def starting_model(job: Job, study: Study) -> tuple[Any, Any]:
    """(model, processor) before training, on the study's device."""
    experiment = job.experiment
    if experiment.start is None:
        tower = os.environ.get("HTC_VLM_TOWER")
        model, processor = presets.build_tiny(stage_preset(experiment, job.seed), tower, job.seed)
        return model.to(study.device), processor
    mgvq = quantizer_of(str(experiment.mgvq), study.work) if needs_quantizer(experiment.compressor) else None
    model, processor = with_compressor(find(experiment.start), experiment.compressor, mgvq, dtype=torch.float32)
    return model.to(study.device), processor


def _fill_training(job: Job, model: Any, study: Study) -> None:
    """The caches that train/setup.py would fill on the CPU, filled on the study's device, under the same names."""
    tower = model.model.vision_tower
    for options in stage_preset(job.experiment, job.seed)["data"]:
        part = presets.DataPart(**options)
        module = presets.task_module(part.task)
        ids = module.images("train")[: part.images]
        if part.json or len(ids) < part.images or part.images < 1:
            continue  # train_stage says what is wrong
        cache = FeatureCache(study.cache / f"{part.task}-train", meta_for(tower, part.images, CODE_PICTURE_SIZE))
        if cache.missing():
            print(f"{part.task}: the tower's features of {len(cache.missing())} training pictures", flush=True)
            fill(cache, tower, partial(_picture, module, ids))
        if needs_quantizer(job.experiment.compressor):
            compressor = model.model.compressor
            file = study.cache / f"{part.task}-codes-{code_key(compressor)}.npy"
            codes_of(cache, partial(_encode, compressor, study.device), file)


def _picture(module: Any, ids: Sequence[str], number: int) -> Any:
    return module.picture(ids[number])


def _encode(compressor: Any, device: str, pixels: torch.Tensor) -> torch.Tensor:
    code: torch.Tensor = compressor.encode(pixels.to(device)).cpu()
    return code


# ------------------------------------------------------------------------------------------------ run
def run_job(job: Job, study: Study, command: str) -> dict[str, Any]:
    """Train if needed, evaluate, write the result file. Started again after a kill, it goes on where it was."""
    folder = job.folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", {"config": job.config})
    training = None
    if job.experiment.stage is not None:
        training = train(job, study)
    measured = {"metrics": {}, "impossible": job.impossible} if job.impossible else evaluate(job, study)
    seconds = measured.get("evaluation_seconds", 0.0) + (training or {"seconds": 0.0})["seconds"]
    result = {
        "row": job.experiment.name,
        "seed": job.seed,
        **measured,
        "training": training,
        "seconds": round(seconds, 1),
        "device": device_name(study.device),
        "threads": torch.get_num_threads(),
        "config": job.config,
        **provenance(),
        "command": command,
    }
    job.result_file(study).parent.mkdir(parents=True, exist_ok=True)
    write_json(job.result_file(study), result)
    return result


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def train(job: Job, study: Study) -> dict[str, Any]:
    """Train the job's model into work/<table>/<row>/<seed>/train unless it is there; what it took."""
    experiment, folder = job.experiment, job.folder(study) / "train"
    steps = job.config["training"]["settings"]["steps"]
    if not is_trained(folder, steps):
        mgvq = str(quantizer_of(str(experiment.mgvq), study.work)) if needs_quantizer(experiment.compressor) else None
        train_stage(
            stage_preset(experiment, job.seed), str(experiment.stage), folder, experiment.start, study.cache, study.data,
            mgvq, experiment.teacher,
        )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = seconds_trained(rows)
    images = steps * job.config["training"]["settings"]["images_per_step"]
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 2) if seconds else None,
        "loss": rows[-1]["loss"] if rows else None,
    }


def load_trained(job: Job, study: Study) -> tuple[Any, Any]:
    """(model, processor) to evaluate, on the study's device."""
    experiment = job.experiment
    if experiment.stage is not None:
        model, processor = load(job.folder(study) / "train" / "model")
    elif needs_quantizer(experiment.compressor):
        mgvq = quantizer_of(str(experiment.mgvq), study.work)
        model, processor = with_compressor(find(str(experiment.start)), experiment.compressor, mgvq)
    elif experiment.compressor == {"name": "none"}:
        model, processor = load(str(experiment.start))
        if model.model.compressor.name != "none":
            raise ValueError(f"{experiment.name}: {experiment.start} is compressed by {model.model.compressor.name}")
    else:
        model, processor = load(str(experiment.start), compressor=experiment.compressor)  # a bottleneck nobody trained
    return model.float().to(study.device).eval(), processor


def evaluate(job: Job, study: Study) -> dict[str, Any]:
    """The numbers of one model on all tasks; {"metrics": {}, "impossible": why} where the method refuses this model."""
    model, processor = load_trained(job, study)
    tests = task_sets(job.experiment, study)
    caches = {name: evaluating.features_of(one, model.model.vision_tower, study.cache) for name, one in tests.items()}
    codes = {name: evaluating.codes_of_tasks(one, model, study.cache) for name, one in tests.items()}
    try:
        name, one = next(iter(tests.items()))
        schedule = _schedule(job, model, processor, one, caches[name], codes[name])
    except ValueError as error:
        if job.config["method"] is None:
            raise
        return {"metrics": {}, "impossible": str(error)}
    out: dict[str, Any] = {"metrics": {}, "answers": {}, "recipe": model.recipe().digest}
    started = time.perf_counter()
    with applied_method(job, model) as applied:
        for name, one in tests.items():
            answerer = evaluating.SharedAnswerer(model, processor, one, caches[name], codes[name])
            texts = evaluating.answer_all(answerer, one, job.folder(study) / "eval" / name, study.batch_size)
            questions = evaluating.with_baselines(one, study.results)
            right = answers.right_answers(one.items, texts)
            out["metrics"] |= answers.metrics_of(name, answers.unpacked_bits(answers.packed_bits(right), len(right)), questions)
            out["answers"][name] = {
                "questions_sha256": one.sha256,
                "n_questions": len(right),
                "right": answers.packed_bits(right),
            }
    compressor = model.model.compressor if applied is None else applied.method
    n_patches, n_layers = next(iter(caches.values())).meta.n_patches, len(schedule)
    return out | {
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "schedule": schedule,
        "equivalent_tokens": round(equivalent_tokens(schedule), 3),
        "cached_tokens": round(equivalent_tokens(compressor.cached_tokens(n_patches, n_layers)), 3),
        "question_independent": bool(compressor.question_independent),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def applied_method(job: Job, model: Any) -> Any:
    """The block in which the job's method is applied; one that gives None where there is none."""
    return nullcontext() if job.config["method"] is None else htc_vlm.apply(model, **job.config["method"])


def _schedule(
    job: Job, model: Any, processor: Any, tests: evaluating.TaskSet, cache: FeatureCache, codes: Any
) -> list[int]:
    """What entered each layer, measured on two pictures. ValueError where a method refuses this model."""
    numbers = [0, min(1, len(tests.images) - 1)]
    if job.config["method"] is None:
        return evaluating.measured_schedule(model, evaluating.image_inputs(model, cache, codes, numbers))
    with htc_vlm.apply(model, **job.config["method"]) as applied:
        features = evaluating.image_inputs(model, cache, None, numbers)["patch_features"]
        Answerer(model, processor).ask(features, [0, 1], [tests.items[0].prompt] * 2, max_new_tokens=1)
        return list(applied.schedule)
