"""Settings from KEY=VALUE and YAML: typed, and refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from htc_vlm import settings


@dataclass(frozen=True)
class Some:
    steps: int = 1
    rate: float = 0.1
    compile: bool = False
    name: str = ""
    stages: tuple[int, ...] = ()
    ratio: float | tuple[float, ...] = 0.5
    start: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def test_values_come_in_the_types_of_the_dataclass() -> None:
    """YAML reads 1e-3 as a string and a tuple as a list."""
    given = {"rate": "1e-3", "stages": [1, 2], "ratio": [0.5, "0.25"], "start": None, "extra": {"a": 1}, "steps": 3}
    assert settings.make(Some, given) == Some(3, 0.001, False, "", (1, 2), (0.5, 0.25), None, {"a": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stps": 3}, "unknown setting 'train.stps'; known: compile, extra, .*steps"),
        ({"steps": 1.5}, "train.steps is 1.5; give a whole number"),
        ({"steps": True}, "train.steps is True; give a whole number"),
        ({"rate": False}, "train.rate is False; give a number"),
        ({"compile": 1}, "train.compile is 1; give true or false"),
        ({"stages": [1, "two"]}, r"train.stages\[1\] is 'two'; give a whole number"),
        ({"stages": 1}, "train.stages is 1; give a list"),
        ({"start": 3}, "train.start is 3; give a word"),
        ({"extra": [1]}, r"train.extra is \[1\]; give a mapping"),
    ],
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    """A value of the wrong type otherwise fails in the middle of a run, or acts as another."""
    with pytest.raises(ValueError, match=message):
        settings.make(Some, given, where="train.")


def test_overrides_reach_into_mappings() -> None:
    """With create=False a mistyped parent is refused instead of made."""
    given: dict[str, Any] = {"stages": {"instruct": {"steps": 1}}}
    settings.override(given, "stages.instruct.steps=2", "a.b=1", create=False)
    assert given == {"stages": {"instruct": {"steps": 2}}}
    with pytest.raises(ValueError, match="no 'instrukt' with values inside"):
        settings.override(given, "stages.instrukt.steps=2", "a.b=1", create=False)
    assert settings.from_pairs(["a.b=1", "a.c=[x, y]", "d=no"], "a=1") == {"a": {"b": 1, "c": ["x", "y"]}, "d": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [("steps", "has no '='; write e.g. steps=3"), ("=3", "names no key"), ("a..b=3", "no key"), ("a={", "not YAML")],
)
def test_a_pair_that_is_none_is_refused(text: str, message: str) -> None:
    """With an example of a right one."""
    with pytest.raises(ValueError, match=message):
        settings.pair(text, "steps=3")


@pytest.mark.parametrize(("text", "message"), [("- a", "expected keys with values"), ("a: [", "not YAML"), ("\ud800", "")])
def test_a_file_that_is_no_mapping_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """The message names the file."""
    file = tmp_path / "some.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"some.yaml.*{message}"):
        settings.read_yaml(file)


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    """YAML reads it as None."""
    (tmp_path / "empty.yaml").write_text("")
    assert settings.read_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(FileNotFoundError, match="nothing.yaml: no such file"):
        settings.read_yaml(tmp_path / "nothing.yaml")
