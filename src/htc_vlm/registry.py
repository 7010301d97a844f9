"""Name -> class, for compressors, quantizers and tasks; other packages add theirs by entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """A small, explicit table of classes; a name is registered once.

    group: entry points of this group, in any installed package, add names; each is loaded when it is first asked for, so
    that a package that cannot be imported breaks nothing but itself. base: what they must be subclasses of. check: raises
    ValueError for a class that cannot work.

    >>> methods: Registry[object] = Registry("method")
    >>> @methods.register("mean")
    ... class Mean: ...
    >>> methods.get("mean").__name__, methods.names()
    ('Mean', ['mean'])
    >>> methods.get("median")
    Traceback (most recent call last):
    ValueError: unknown method 'median'; known: mean
    """

    def __init__(
        self, kind: str, group: str | None = None, base: type | None = None, check: Callable[[Any], None] | None = None
    ) -> None:
        self.kind = kind
        self.group = group
        self.base = base
        self.check = check or (lambda cls: None)
        self._classes: dict[str, type] = {}
        self._is_looked_at = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator; raises ValueError when `name` is taken by another class, and what `check` raises."""

        def add(cls: C) -> C:
            self.check(cls)
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is already registered by {self._classes[name].__qualname__}")
            self._classes[name] = cls
            return cls

        return add

    def unregister(self, name: str) -> None:
        """Forget a name; for tests of a class that is no part of any package."""
        del self._classes[name]

    def get(self, name: str) -> type[T]:
        """The class registered as `name`, here or by an entry point; ValueError lists the known names."""
        if name not in self._classes:
            found = [point for point in self._entry_points() if point.name == name]
            if not found:
                raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
            self._load(name, found)
        self._tell_shadowed()
        return cast("type[T]", self._classes[name])

    def names(self) -> list[str]:
        """All names, those of entry points included (which are not loaded for it)."""
        return sorted({*self._classes, *(point.name for point in self._entry_points())})

    def own_names(self) -> list[str]:
        """The names that are registered already, without entry points that nobody has asked for."""
        return sorted(self._classes)

    def _entry_points(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self.group)) if self.group else ()

    def _tell_shadowed(self) -> None:
        """Warn, once, of names of other packages that are taken here: theirs would be thought to run, and ours does."""
        if self._is_looked_at:
            return
        self._is_looked_at = True
        for point in self._entry_points():
            ours = self._classes.get(point.name)
            if ours is not None and not _is(point, ours):
                told = f"{self.kind} {point.name!r} is {ours.__module__}.{ours.__qualname__}"
                warnings.warn(f"{told}, and that of {_origin(point)} is not used; give it another name", stacklevel=3)

    def _load(self, name: str, found: list[EntryPoint]) -> None:
        """Register what an entry point names. ValueError says which package is at fault."""
        values = sorted({point.value for point in found})
        if len(values) > 1:
            raise ValueError(f"{self.kind} {name!r} is offered by more than one package: {'; '.join(map(_origin, found))}")
        try:
            cls: Any = found[0].load()
        except Exception as error:  # whatever a stranger's module does when it is imported
            raise ValueError(
                f"{self.kind} {name!r} of {_origin(found[0])} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(cls, type) or getattr(cls, "name", name) != name:
            raise ValueError(
                f"{self.kind} {name!r} of {_origin(found[0])} is {cls!r}; an entry point names a class whose `name` is {name!r}"
            )
        if self.base is not None and not issubclass(cls, self.base):
            raise ValueError(
                f"{self.kind} {name!r} of {_origin(found[0])} is no {self.base.__name__}; inherit {self.base.__module__}."
                f"{self.base.__name__}"
            )
        try:
            self.check(cls)
        except ValueError as error:
            raise ValueError(f"{self.kind} {name!r} of {_origin(found[0])} cannot work: {error}") from error
        self._classes.setdefault(name, cls)  # it may have registered itself

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())


def _is(point: EntryPoint, cls: type) -> bool:
    """Does an entry point name this class? A package may have registered it before, when it was imported."""
    try:
        return point.load() is cls
    except Exception:  # whatever a stranger's module does when it is imported
        return False


def _origin(point: EntryPoint) -> str:
    """The package of an entry point and where in it the class is."""
    return f"{point.dist.name if point.dist is not None else 'an unnamed package'} ({point.value})"
