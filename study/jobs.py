"""What one run of the study is: an experiment with a seed, and everything that its numbers depend on, checked and hashed.

Source:  docs/design.md (one experiment = one YAML = one JSON per seed).
Differs: nothing known.

A result is never overwritten: one that was made under another config is an error that says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from htc_vlm import compressors
from htc_vlm.model.loading import find
from htc_vlm.ops import schedules
from htc_vlm.train import presets
from study import answers, evaluating
from study.definitions import Experiment
from study.fast_trainer.model import method_of
from study.fast_trainer.settings import Run, find_run, make_run, read_settings

QUANTIZER = "model.compressor.quantizer."
# Settings of the loop that change no weight.
WITHOUT_EFFECT = ("seed", "save_every", "log_every", "measure_every", "workers", "answers_only")


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


def quantizer_of(name: str, work: Path) -> Path:
    """A folder with the quantizer's weights: `name` itself, or those that a checkpoint carries, taken out into `work`."""
    path = Path(name)
    if path.is_file() or (path.is_dir() and not _carried(path)):
        return path
    folder = find(name)
    keys = _carried(folder)
    if not keys:
        raise ValueError(f"mgvq: the checkpoint {name} carries no quantizer; give an MGVQ folder or file")
    tensors = {}
    for file, key in keys:
        with safe_open(file, framework="pt") as opened:
            tensors[key.removeprefix(QUANTIZER)] = opened.get_tensor(key).contiguous()
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.float().numpy().tobytes())
    out = work / f"quantizer-{digest.hexdigest()[:12]}" / "model.safetensors"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial_file = out.with_name(f"{os.getpid()}.partial")
        save_file(tensors, partial_file)
        partial_file.replace(out)
    return out.parent


def _carried(folder: Path) -> list[tuple[Path, str]]:
    """(file, name) of the quantizer's weights inside a checkpoint."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found += [(file, key) for key in opened.keys() if key.startswith(QUANTIZER)]  # noqa: SIM118
    return found


def needs_quantizer(compressor: Mapping[str, Any]) -> bool:
    """Does this method read a code?"""
    return bool(getattr(compressors.build(**compressor), "has_code", False))


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
    if experiment.run is not None:
        return run_config(experiment, seed, work)
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
        out["quantizer"] = code_identity(given_quantizer(experiment, work))
    if experiment.start is None:
        out |= {name: preset.get(name) for name in ("vision", "text", "words")}
    return out


def fast_run(experiment: Experiment, seed: int) -> Run:
    """The settings of a row that study/fast_trainer trains."""
    mgvq = experiment.mgvq if needs_quantizer(experiment.compressor) else None
    own = {"compressor": experiment.compressor, "start": experiment.start, "mgvq": mgvq, "seed": seed}
    settings = {**read_settings(find_run(str(experiment.run))), **experiment.training, **own}
    return make_run({**settings, "title": experiment.title, "note": ""}, experiment.run)


def run_config(experiment: Experiment, seed: int, work: Path) -> dict[str, Any]:
    """All that the weights of such a row depend on, beside start and seed."""
    run = fast_run(experiment, seed)
    method_of(run.compressor)
    elsewhere = ("compressor", "start", "mgvq", "seed", "log_every", "measure_every", "watch")
    quantizer = code_identity(given_quantizer(experiment, work)) if needs_quantizer(experiment.compressor) else None
    settings = {name: value for name, value in run.binding().items() if name not in elsewhere}
    return {"run": Path(str(experiment.run)).stem, "settings": settings, "quantizer": quantizer}


def given_quantizer(experiment: Experiment, work: Path) -> Path:
    """The quantizer that an experiment names; ValueError where it names none."""
    if experiment.mgvq is None:
        raise ValueError("this method reads a code: give mgvq, a quantizer or a checkpoint that carries one")
    return quantizer_of(experiment.mgvq, work)


def code_identity(path: Path) -> str:
    """Hash of a quantizer's file."""
    file = path / "model.safetensors" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def make_job(experiment: Experiment, seed: int, study: Study) -> Job:
    """Everything checked that can be before a model is trained. ValueError names the experiment and what is wrong."""
    try:
        method, impossible = resolved_method(experiment, seed, study)
        compressors.build(**experiment.compressor)
        if not experiment.is_trained and experiment.start is None:
            raise ValueError("nothing to evaluate: give start (a checkpoint) or stage (to train)")
        if experiment.method is not None and experiment.is_trained:
            raise ValueError("`method` needs no training; leave out stage and run")
        if not experiment.tasks:
            raise ValueError("no tasks to evaluate")
        config = {
            "start": checkpoint_identity(experiment.start),
            "compressor": experiment.compressor,
            "method": method,
            "training": training_config(experiment, seed, study.work) if experiment.is_trained else None,
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
