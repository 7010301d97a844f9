"""Check a method against what every method promises: `check_compressor(MyMethod)`.

Source:  ours; in the manner of scikit-learn's check_estimator.
Differs: no pytest is needed. The models are tiny and random, made here, on sdpa and on eager.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from htc_vlm.compressors import COMPRESSORS, AppliedOnly, Compressor, build, get
from htc_vlm.compressors.base import check_class
from htc_vlm.testing import applied_checks, own_checks, tiny_llava
from htc_vlm.testing.cases import BACKENDS, Case


@dataclass(frozen=True)
class Check:
    """One promise of one method; calling it raises AssertionError where it is broken.

    promise: a function of a Case whose docstring names the fault that it prevents, or of the class (`of_class`).
    """

    cls: type[Compressor]
    promise: Callable[[Any], None]
    backends: tuple[str, ...] = BACKENDS
    of_class: bool = False

    def __call__(self) -> None:
        with registered(self.cls), torch.no_grad():
            if self.of_class:
                self._run(self.cls, "all its examples")
                return
            for i, example in enumerate(self.cls.EXAMPLES):
                for backend in self.backends if i == 0 else self.backends[:1]:  # that both agree is a promise of its own
                    case = Case({"name": self.cls.name, **example}, backend)
                    self._run(case, f"EXAMPLES {json.dumps(example)} on {backend}")

    def _run(self, given: Any, where: str) -> None:
        try:
            self.promise(given)
        except Exception as error:
            error.add_note(f"{self} ({where}). What it prevents: {self.promise.__doc__}")
            raise

    def __str__(self) -> str:
        return f"{self.cls.name}: {self.promise.__name__.replace('_', ' ')}"


@contextmanager
def registered(cls: type[Compressor]) -> Iterator[None]:
    """Inside the block the class is known by its name. ValueError where another class has it."""
    name = cls.name
    known = COMPRESSORS.own_names()
    if name in known and get(name) is not cls:
        raise ValueError(f"the name {name!r} belongs to {get(name).__module__}.{get(name).__qualname__}; choose another")
    if name not in known:
        COMPRESSORS.register(name)(cls)
    try:
        yield
    finally:
        if name not in known:
            COMPRESSORS.unregister(name)
            tiny_llava.forget()


def checks_of(method: str | type[Compressor]) -> list[Check]:
    """The promises of a method, by name or class, each to be called; pytest can parametrize over them with ids=str.

    ValueError for a class that lacks what a method needs to be named and run.
    """
    cls = get(method) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Compressor)):
        raise ValueError(f"{cls!r} is no method; subclass htc_vlm.compressors.Compressor")
    if not isinstance(getattr(cls, "name", None), str):
        raise ValueError(f"{cls.__qualname__} has no name; set the class attribute `name`")
    if not cls.EXAMPLES:
        raise ValueError(f"{cls.name} has no EXAMPLES; give settings that run on 16 patches and 3 layers, mildest first")
    if not isinstance(cls.EXAMPLES, tuple | list) or not all(isinstance(one, Mapping) for one in cls.EXAMPLES):
        raise ValueError(f"{cls.name}: EXAMPLES is {cls.EXAMPLES!r:.80}; give a tuple of settings, e.g. ({{'n_keep': 4}},)")
    check_class(cls)
    found = [Check(cls, promise, of_class=True) for promise in own_checks.OF_CLASS]
    can_be_own = not issubclass(cls, AppliedOnly)
    if can_be_own:
        found += [Check(cls, promise) for promise in own_checks.ON_BOTH]
        found += [Check(cls, promise, backends=("sdpa",)) for promise in own_checks.ON_ONE]
        found.append(Check(cls, own_checks.every_weight_gets_a_gradient, of_class=True))
    with registered(cls):
        has_bottleneck = any(build(cls.name, **example).n_bottleneck for example in cls.EXAMPLES)
    if cls.setup in (Compressor.setup, AppliedOnly.setup) and not has_bottleneck:
        found += [Check(cls, promise) for promise in applied_checks.ON_BOTH]
        found += [Check(cls, promise, backends=("sdpa",)) for promise in applied_checks.ON_ONE]
    return found


def check_compressor(method: str | type[Compressor]) -> list[str]:
    """Check a method, by name or class, on tiny random models: its own and, where it needs no weights, those it is applied to.

    Takes some seconds on a CPU; needs neither pytest nor a network. Each of the method's EXAMPLES is run on sdpa, the first
    on eager as well, and that both agree is checked of each. Returns what was checked, one line a promise. AssertionError
    (or whatever the method itself raises) for the first promise that is broken, with the promise, the settings and the
    attention backend in its notes.
    """
    done = []
    for check in checks_of(method):
        check()
        done.append(str(check))
    return done
