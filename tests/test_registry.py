"""Registries: names of our own, and of other packages by entry points."""

from __future__ import annotations

import warnings
from collections import Counter
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from htc_vlm import compressors, quantizers, registry
from htc_vlm.eval.task import TASKS
from htc_vlm.registry import Registry


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """One own class, and entry points: right, broken, no class, misnamed, and offered twice."""
    points = {
        "right": "collections:OrderedDict", "broken": "no_such_module:X", "crashes": "json:NoSuchName",
        "no_class": "json:dumps", "misnamed": "htc_vlm.compressors.fastv:FastV", "own": "collections:Counter",
    }  # fmt: skip
    found = [EntryPoint(name, value, "test.methods") for name, value in points.items()]
    found += [EntryPoint("twice", f"collections:{value}", "test.methods") for value in ("Counter", "deque")]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in found if point.group == group])
    made: Registry[Any] = Registry("method", group="test.methods")
    made.register("own")(dict)
    return made


def test_other_packages_are_listed_without_being_imported(methods: Registry[Any]) -> None:
    """A list of names must not fail, or take seconds, for a package that nobody asked for."""
    assert methods.names() == ["broken", "crashes", "misnamed", "no_class", "own", "right", "twice"]
    assert methods.own_names() == ["own"]


def test_an_entry_point_is_loaded_when_it_is_asked_for(methods: Registry[Any]) -> None:
    """And an own name is never taken over: who offers another under it is told, once."""
    with pytest.warns(UserWarning, match=r"method 'own' is builtins.dict, and that of .*Counter.* is not used"):
        assert methods.get("right").__name__ == "OrderedDict" and methods.own_names() == ["own", "right"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert methods.get("own") is dict and methods.get("right")


def test_a_class_that_registered_itself_shadows_nobody(methods: Registry[Any]) -> None:
    """An entry point's module may have been imported before."""
    methods.unregister("own")
    methods.register("own")(Counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert methods.get("own") is Counter


def test_what_is_no_method_is_refused(methods: Registry[Any]) -> None:
    """A class of another kind failed later, by what it lacks."""
    methods.base = list
    with pytest.raises(ValueError, match=r"'right' of .*OrderedDict.* is no list; inherit builtins.list"):
        methods.get("right")


def test_a_class_that_cannot_work_is_refused_with_its_package(methods: Registry[Any]) -> None:
    """The registry's check says why; a name is not taken by it."""

    def check(cls: type) -> None:
        raise ValueError(f"{cls.__name__} does nothing")

    methods.check = check
    with pytest.raises(ValueError, match=r"'right' of .*\(collections:OrderedDict\) cannot work: OrderedDict does nothing"):
        methods.get("right")
    with pytest.raises(ValueError, match="Counter does nothing"):
        methods.register("mine")(Counter)
    assert methods.own_names() == ["own"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"method 'broken' of an unnamed package \(no_such_module:X\) cannot be loaded: ModuleNotFoundError"),
        ("crashes", "cannot be loaded: AttributeError"),
        ("no_class", "an entry point names a class"),
        ("misnamed", "an entry point names a class whose `name` is 'misnamed'"),
        ("twice", "'twice' is offered by more than one package: .*Counter.*deque"),
        ("nobody", "unknown method 'nobody'; known: broken, crashes"),
    ],
)
def test_what_is_wrong_with_another_package_is_named(methods: Registry[Any], name: str, message: str) -> None:
    """And does not break the others."""
    with pytest.raises(ValueError, match=message):
        methods.get(name)
    methods.unregister("own")
    assert methods.get("right")


def test_the_groups_are_those_that_the_docs_name() -> None:
    """Packages elsewhere depend on these strings."""
    groups = [found.group for found in (compressors.COMPRESSORS, quantizers.QUANTIZERS, TASKS)]
    assert groups == ["htc_vlm.compressors", "htc_vlm.quantizers", "htc_vlm.tasks"]
