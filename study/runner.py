"""One row of a study, from its YAML file to its result file: train what is missing, evaluate, write.

Source:  docs/design.md (one experiment = one YAML = one JSON per seed).
Differs: nothing known.

All rows share the frozen tower's features (`cache`), the order of the data (by the seed) and the weights they start
from.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import htc_vlm
from htc_vlm.eval.run_info import provenance
from htc_vlm.files import write_json
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.answering import Answerer
from htc_vlm.model.loading import find, load
from htc_vlm.tiny.features import FeatureCache
from htc_vlm.tokens import equivalent_tokens
from htc_vlm.train import presets
from htc_vlm.train.packed_data import open_sources
from htc_vlm.train.setup import train_stage
from study import answers, evaluating
from study.fast_trainer import train as fast_trainer
from study.fast_trainer.state import METRICS, finished
from study.jobs import Job, Study, fast_run, needs_quantizer, quantizer_of, stage_preset, task_sets


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
        if job.experiment.stage is not None:  # the fast trainer fills its own
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
    """The caches that training would fill on the CPU, filled on the study's device."""
    preset = stage_preset(job.experiment, job.seed)
    with suppress(ValueError):  # train_stage says what is wrong with the data
        open_sources(preset, model, study.cache, {part["task"]: [] for part in preset["data"]})


# ------------------------------------------------------------------------------------------------ run
def run_job(job: Job, study: Study, command: str) -> dict[str, Any]:
    """Train if needed, evaluate, write the result file. Started again after a kill, it goes on where it was."""
    folder = job.folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").is_file():
        write_json(folder / "config.json", {"config": job.config})
    training = None
    if job.experiment.is_trained:
        training = train(job, study) if job.experiment.run is None else train_fast(job, study)
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
    if job.experiment.run is not None:
        shutil.copyfile(folder / "train" / METRICS, job.result_file(study).with_suffix(".jsonl"))
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


def train_fast(job: Job, study: Study) -> dict[str, Any]:
    """As `train`, by study/fast_trainer."""
    folder, run = job.folder(study) / "train", fast_run(job.experiment, job.seed)
    report = finished(folder, run) or fast_trainer.train(run, folder, study.cache, study.data, resume=True)
    note = report["settings"]["note"]
    kept = {name: report[name] for name in ("steps", "seconds", "images_per_second", "loss")}
    return {**kept, "note": note} if note else kept


def load_trained(job: Job, study: Study) -> tuple[Any, Any]:
    """(model, processor) to evaluate, on the study's device."""
    experiment = job.experiment
    trained = job.folder(study) / "train"
    if experiment.run is not None and fast_run(experiment, job.seed).lora is not None:
        model, processor = load(str(experiment.start), adapter=trained / "adapter")
    elif experiment.is_trained:
        model, processor = load(trained / "model")
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
    out: dict[str, Any] = {"recipe": model.recipe().digest}
    started = time.perf_counter()
    with applied_method(job, model) as applied:
        ask = partial(ask_all, job, study, model, processor, tests, caches, codes)
        out |= ask(None)
        if fewer := model.model.compressor.budgets[:-1]:  # an elastic model: also what its first entries keep
            out["by_entries"] = {str(n_entries): ask(n_entries) for n_entries in fewer}
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


def ask_all(
    job: Job, study: Study, model: Any, processor: Any, tests: Mapping[str, evaluating.TaskSet],
    caches: Mapping[str, FeatureCache], codes: Mapping[str, Any], n_entries: int | None,
) -> dict[str, Any]:  # fmt: skip
    """{"metrics", "answers"} of all tasks; n_entries: of an elastic model, how many a picture gets."""
    found: dict[str, Any] = {"metrics": {}, "answers": {}}
    for name, one in tests.items():
        answerer = evaluating.SharedAnswerer(model, processor, one, caches[name], codes[name], n_entries)
        folder = job.folder(study) / "eval" / (name if n_entries is None else f"{name}@{n_entries}")
        right = answers.right_answers(one.items, evaluating.answer_all(answerer, one, folder, study.batch_size))
        bits, questions = answers.packed_bits(right), evaluating.with_baselines(one, study.results)
        found["metrics"] |= answers.metrics_of(name, answers.unpacked_bits(bits, len(right)), questions)
        found["answers"][name] = {"questions_sha256": one.sha256, "n_questions": len(right), "right": bits}
    return found


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
