"""Experiments: one YAML file per row of a table, holding only what differs from study/experiments/defaults.yaml.

Source:  ours.
Differs: nothing known. An unknown key is refused.

study/experiments/defaults.yaml         what all rows share
study/experiments/tables.yaml           the tables: title, rows in order, columns, what is compared
experiments/<table>/<row>.yaml    one row; its results are results/<table>/<row>/<seed>.json
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from htc_vlm.settings import check_keys, override, pair, read_yaml

DEFAULTS, TABLES = "defaults.yaml", "tables.yaml"
RUNS = "tiny"  # the folder beside the tables with settings of the fast trainer
OF_A_STAGE = ("preset", "stage", "training", "data")  # defaults that a row of the fast trainer does not take
MERGED = ("training", "tasks")  # taken over key by key; the other keys as a whole
TASK_KEYS = ("task", "split", "limit")


@dataclass(frozen=True)
class Experiment:
    """One row of a table, defaults filled in.

    stage: of the preset, None = the weights of `start` as they are. compressor: the model's own method. method: applied
    from outside to an uncompressed model (`htc_vlm.apply`); `share: 192` in it stands for the tokens that are as
    many of the model's patches as 192 of 576. mgvq: a quantizer's folder or file, or a checkpoint that carries one.
    training: what differs from the preset's stage. run: trained by study/fast_trainer instead, by these settings of
    experiments/tiny, or a file; `training` then replaces some of them. tasks: name -> task, split, limit. same_as:
    "table/row" whose results are this row's, too.
    """

    table: str
    row: str
    title: str = ""
    note: str = ""
    preset: str = "tiny"
    stage: str | None = None
    run: str | None = None
    start: str | None = None
    mgvq: str | None = None
    teacher: str | None = None
    compressor: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    method: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    data: list[dict[str, Any]] | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    same_as: str | None = None

    @property
    def name(self) -> str:
        """table/row"""
        return f"{self.table}/{self.row}"

    @property
    def is_trained(self) -> bool:
        """Does this row train anything?"""
        return self.stage is not None or self.run is not None


KEYS = tuple(key.name for key in fields(Experiment) if key.name not in ("table", "row"))


@dataclass(frozen=True)
class Comparison:
    """Two rows to compare question by question, and what their difference tells."""

    first: str
    second: str
    asks: str


@dataclass(frozen=True)
class Table:
    """One table of the study. columns: names or patterns of metrics ("pictograms-unseen/*"), by group."""

    name: str
    title: str
    rows: tuple[str, ...]
    columns: dict[str, tuple[str, ...]]
    about: str = ""
    lower: str | None = None  # "table/row" of the bounds; their difference is what retention is a share of
    upper: str | None = None
    compare: tuple[Comparison, ...] = ()
    lines: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the plot: label -> rows


def merge(defaults: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's settings over the defaults; a key of `training` or `tasks` that is null in the row is left out.

    >>> merge({"stage": "compress", "training": {"steps": 10, "seed": 1}}, {"training": {"steps": 20, "seed": None}})
    {'stage': 'compress', 'training': {'steps': 20}}
    """
    out = copy.deepcopy(dict(defaults))
    for key, value in row.items():
        if key in MERGED and isinstance(value, dict):
            both = {**(out.get(key) or {}), **value}
            out[key] = {name: inner for name, inner in both.items() if inner is not None}
        else:
            out[key] = copy.deepcopy(value)
    return out


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """experiments/<table>/<row>.yaml over defaults.yaml beside its folder; ValueError names the file and what is wrong."""
    root = path.resolve().parent.parent
    defaults, own = read_yaml(root / DEFAULTS), read_yaml(path)
    for where, given in ((root / DEFAULTS, defaults), (path, own)):
        check_keys(where, given, KEYS)
    if own.get("run") is not None:
        defaults = {key: value for key, value in defaults.items() if key not in OF_A_STAGE}
    settings = merge(defaults, own)
    for text in overrides:
        check_keys(f"--set {text}", {pair(text, "training.steps=100")[0][0]: None}, KEYS)
        override(settings, text, "training.steps=100")
    _check_types(path, settings)
    for name, task in settings.get("tasks", {}).items():
        check_keys(f"{path}: task {name}", task, TASK_KEYS)
        if "/" in name:
            raise ValueError(f"{path}: task {name!r}: leave out the slash, it separates a task from its kinds of question")
    experiment = Experiment(path.resolve().parent.name, path.stem, **settings)
    if experiment.run is not None and experiment.stage is not None:
        raise ValueError(f"{path}: `run` trains by the fast trainer, `stage` by the library's; give one of them")
    if experiment.method and experiment.compressor != {"name": "none"}:
        raise ValueError(f"{path}: `method` is applied to an uncompressed model; leave out `compressor`")
    return experiment


def _check_types(path: Path, settings: Mapping[str, Any]) -> None:
    mappings, words = ("compressor", "training", "tasks"), ("title", "note", "preset")
    wrong = [key for key in mappings if key in settings and not isinstance(settings[key], dict)]
    wrong += [key for key in words if key in settings and not isinstance(settings[key], str)]
    optional = dict.fromkeys(("stage", "run", "start", "mgvq", "teacher", "same_as"), str) | {"method": dict, "data": list}
    wrong += [k for k, kind in optional.items() if settings.get(k) is not None and not isinstance(settings[k], kind)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {settings[wrong[0]]!r}, wrong in shape; see study/experiments/README.md")
    for key in ("compressor", "method"):
        if settings.get(key) and "name" not in settings[key]:
            raise ValueError(f"{path}: {key} has no name")


def followed(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment whose results a row shows: itself, or the one it is `same_as`."""
    experiment = read_experiment(path, overrides)
    if experiment.same_as is None:
        return experiment
    other = path.resolve().parent.parent / f"{experiment.same_as}.yaml"
    if not other.is_file():
        raise ValueError(f"{path}: same_as is {experiment.same_as!r}, but there is no {other.name} in {other.parent}")
    found = read_experiment(other, overrides)
    if found.same_as is not None:
        raise ValueError(f"{path}: same_as names {experiment.same_as}, which is same_as {found.same_as}; name that one")
    return found


def read_tables(root: Path) -> dict[str, Table]:
    """The tables of study/experiments/tables.yaml, in order."""
    path = root / TABLES
    return {name: _table(path, name, block) for name, block in read_yaml(path).items()}


def _table(path: Path, name: str, block: Any) -> Table:
    known = [key.name for key in fields(Table) if key.name != "name"]
    if not isinstance(block, dict):
        raise ValueError(f"{path}: {name} is {block!r}; give it title, rows and columns")
    check_keys(f"{path}: {name}", block, known)
    absent = [key for key in ("title", "rows", "columns") if key not in block]
    if absent:
        raise ValueError(f"{path}: {name} has no {absent[0]}")
    compare = tuple(Comparison(*entry) for entry in block.get("compare", ()))
    columns = {group: tuple(patterns) for group, patterns in block["columns"].items()}
    lines = {label: tuple(rows) for label, rows in block.get("lines", {}).items()}
    return Table(name, **{**block, "rows": tuple(block["rows"]), "columns": columns, "compare": compare, "lines": lines})


def columns_for(patterns: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """The metrics that the patterns name, in the patterns' order; a pattern that fits none stays as it is.

    >>> columns_for(["scenes/*", "easy/open", "cars/*"], ["easy/open", "scenes/name", "scenes/count", "scenes/score"])
    ['scenes/name', 'scenes/count', 'easy/open', 'cars/*']
    """
    found: list[str] = []
    for pattern in patterns:
        fits = [name for name in metrics if fnmatch.fnmatch(name, pattern)]
        fits = [name for name in fits if not (pattern.endswith("*") and name.endswith("/score"))]
        found += [name for name in (fits or [pattern]) if name not in found]
    return found
