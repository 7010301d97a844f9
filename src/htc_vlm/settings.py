"""Reads settings: KEY=VALUE from the command line and YAML files, into dataclasses with checked types."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

# The C one is ten times as fast, which a page made of 500 files feels.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", dict: "a mapping", list: "a list"}
S = TypeVar("S")


def budget(text: str) -> float:
    """`64` -> 64 tokens, `0.11` -> a share of the patches; the type of `--budget`.

    >>> budget("64"), budget("0.11")
    (64, 0.11)
    """
    return int(text) if text.strip().isdigit() else float(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; an empty file is an empty one. ValueError or FileNotFoundError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys with values, found {content!r:.60}")
    return content


def pair(text: str, example: str) -> tuple[list[str], Any]:
    """KEY=VALUE -> the parts of the key, and the value read as YAML. ValueError shows the example.

    >>> pair("stages.compress.steps=100", "n_keep=12"), pair("place=[1, 2]", "n_keep=12")
    ((['stages', 'compress', 'steps'], 100), (['place'], [1, 2]))
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals:
        raise ValueError(f"--set {text!r} has no '='; write e.g. {example}")
    if not all(parts):
        raise ValueError(f"--set {text!r} names no key; write e.g. {example}")
    try:
        return parts, yaml.load(value, Loader=LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: {value!r} is not YAML") from error


def override(settings: dict[str, Any], text: str, example: str, create: bool = True) -> None:
    """Apply KEY=VALUE in place; a key with dots reaches into mappings. create: make those that are not there.

    >>> settings = {"training": {"steps": 10}}
    >>> override(settings, "training.steps=20", "a.b=1"); override(settings, "start=runs/mine", "a.b=1"); settings
    {'training': {'steps': 20}, 'start': 'runs/mine'}
    """
    (*parents, last), value = pair(text, example)
    node = settings
    for parent in parents:
        if create:
            node.setdefault(parent, {})
        if not isinstance(node.get(parent), dict):
            raise ValueError(f"--set {text!r}: there is no {parent!r} with values inside")
        node = node[parent]
    node[last] = value


def from_pairs(pairs: Sequence[str], example: str) -> dict[str, Any]:
    """KEY=VALUE texts -> settings.

    >>> from_pairs(["n_keep=12", "quantizer.preset=tiny"], "n_keep=12")
    {'n_keep': 12, 'quantizer': {'preset': 'tiny'}}
    """
    settings: dict[str, Any] = {}
    for text in pairs:
        override(settings, text, example)
    return settings


def check_keys(where: object, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """ValueError names the first key that nothing reads."""
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")


def check_complete(where: str, cls: Any, given: Mapping[str, Any]) -> None:
    """ValueError names the fields of a dataclass of settings that have no default and are not given."""
    needed = [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}, for which there is no default")


def make(
    cls: type[S], given: Mapping[str, Any], where: str = "", what: str = "setting", also_known: Sequence[str] = ()
) -> S:
    """A dataclass of settings; missing ones have its defaults. ValueError for unknown keys, wrong types and
    one without a default that is left out.

    where: what stands before a setting's name in messages, e.g. "words."; what: what it is called there. also_known: keys
    that somebody else reads.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        raise ValueError(f"unknown {what} {where + unknown[0]!r}; known: {', '.join(sorted([*known, *also_known]))}")
    check_complete(where.rstrip(".") or cls.__name__, cls, given)
    hints = get_type_hints(cls)
    return cls(**{name: typed(f"{where}{name}", value, hints[name]) for name, value in given.items()})


def typed(name: str, value: Any, kind: Any) -> Any:
    """A value in the type of a setting ("2e-3" is a string in YAML); ValueError where it cannot be.

    >>> typed("learning_rate", "2e-3", float), typed("stages", [1, 2], tuple[int, ...]), typed("start", None, str | None)
    (0.002, (1, 2), None)
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        return _first_that_fits(name, value, [part for part in get_args(kind) if part is not type(None)])
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r}; give a number") from error
    if origin is tuple and isinstance(value, list | tuple):
        inner = get_args(kind)[0]
        return tuple(typed(f"{name}[{i}]", item, inner) for i, item in enumerate(value))
    plain = {tuple: list, Mapping: dict}.get(origin or kind, origin or kind)
    if not isinstance(plain, type):
        return value  # Literal, a type variable, ...: whoever uses it checks it
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is int):
        raise ValueError(f"{name} is {value!r}; give {WORDS.get(plain, plain.__name__)}")
    return value


def _first_that_fits(name: str, value: Any, kinds: list[Any]) -> Any:
    for kind in kinds[:-1]:
        try:
            return typed(name, value, kind)
        except ValueError:
            continue
    return typed(name, value, kinds[-1])
