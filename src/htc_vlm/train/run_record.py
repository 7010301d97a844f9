"""run.json: what a training run was begun with, so that it is resumed with the same or refused.

Source:  ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from htc_vlm.files import write_json
from htc_vlm.train import presets

FILE = "run.json"
VERSIONS = "data_version"
# What may change between two starts of one run: it changes no weights.
FREE = ("save_every", "log_every", "measure_every", "workers", "compile", "answers_only")
# What a run writes into its folder, and what tells a run's folder from any other.
WRITES = (
    "model", "adapter", "preset.json", "report.json", "metrics.jsonl", "loss.png", "config.json", "model.safetensors",
    "training.pt",
)  # fmt: skip
OLD_RUN = ("checkpoint-*/trainer_state.json", "preset.json", "training.pt", "checkpoint-*", "metrics.jsonl")


def record_of(preset: Mapping[str, Any], stage: str, files: Mapping[str, str | Path | None]) -> dict[str, Any]:
    """Everything that decides a run's weights, flat: dotted name -> value. files: --start, --mgvq and the like by name."""
    block = presets.loop_settings(preset["stages"][stage])
    settings = {name: value for name, value in asdict(block).items() if name not in FREE}
    own = {name: value for name, value in preset["stages"][stage].items() if name in presets.STAGE_KEYS}
    shared = {name: value for name, value in preset.items() if name not in ("stages", "name", "data")}
    data = [{**part, **({"json": _digest(Path(part["json"]))} if part.get("json") else {})} for part in preset["data"]]
    if versions := _versions(preset["data"]):
        shared[VERSIONS] = versions
    parts = {"stage": stage, "data": [{k: v for k, v in part.items() if k != "image_folder"} for part in data], **shared}
    named = {f"--{name}": _identity(path) for name, path in files.items() if path is not None}
    found: dict[str, Any] = json.loads(json.dumps({**parts, **{f"stages.{stage}": {**settings, **own}}, **named}))
    return _flat(found)


def _versions(data: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Task -> what decides its pictures beside code; without tasks that code alone decides, and those whose files are gone."""
    found = {}
    for part in data:
        module: Any = None if part.get("json") else presets.task_module(part["task"])
        if hasattr(module, "version"):
            with suppress(FileNotFoundError):  # a run that is done needs them no longer; another one will say what is missing
                found[part["task"]] = str(module.version())
    return found


def check(output: Path, record: Mapping[str, Any]) -> None:
    """ValueError where another run, or somebody's files, are in the folder."""
    file = output / FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        missing = object()
        names = [name for name in {**before, **record} if before.get(name, missing) != record.get(name, missing)]
        names = [name for name in names if not name.startswith(f"{VERSIONS}.") or (name in before and name in record)]
        if names:
            told = "; ".join(f"{name} was {_told(before, name)}, is {_told(record, name)}" for name in sorted(names)[:4])
            raise ValueError(f"{output}: begun with other settings: {told}. Give the same again, or another --output")
        return
    refuse_foreign(output)
    if any(True for pattern in OLD_RUN for _ in output.glob(pattern)):
        print(f"{output}: begun before settings were recorded; taken to have been those given now", flush=True)


def begin(output: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a new run, once everything it needs was found; the first process does."""
    if int(os.environ.get("RANK", "0")) == 0 and not (output / FILE).is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / FILE, dict(record))


def refuse_foreign(output: Path) -> None:
    """ValueError where a run would write over files that no run has written, a checkpoint's for example."""
    foreign = [name for name in WRITES if (output / name).exists()]
    if foreign and not any(True for pattern in (FILE, *OLD_RUN) for _ in output.glob(pattern)):
        raise ValueError(f"{output / foreign[0]}: already there, and not of a training run; give another --output")


def finished(output: Path, steps: int) -> dict[str, Any] | None:
    """The report of a run that is done (model or adapter, and all steps), or None. The report is written last."""
    report = output / "report.json"
    left = (output / "model" / "config.json", output / "adapter" / "adapter.json")
    if not report.is_file() or not any(file.is_file() for file in left):
        return None
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found if found.get("steps") == steps else None


def _told(record: Mapping[str, Any], name: str) -> str:
    return repr(record[name]) if name in record else "not given"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> _flat({"a": {"b": 1, "c": {}}, "d": [2]})
    {'a.b': 1, 'a.c': {}, 'd': [2]}
    """
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def _digest(file: Path) -> str:
    """SHA-256 of a file's bytes; a missing file is told later, by its reader."""
    if not file.is_file():
        return str(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _identity(path: str | Path) -> str:
    """A checkpoint, wherever it lies: its file names, sizes and JSON files; a name as it is."""
    where = Path(path)
    if where.is_file():
        return f"{where.name} of {where.stat().st_size} bytes"
    if not where.is_dir():
        return str(path)
    files = sorted(one for one in where.iterdir() if one.is_file() and not one.name.startswith("."))
    digest = hashlib.sha256()
    for one in files:
        digest.update(f"{one.name} {one.stat().st_size}\n".encode())
        if one.suffix == ".json" and one.stat().st_size < 1 << 20:
            digest.update(one.read_bytes())
    return f"{where.name} {digest.hexdigest()[:16]}"
