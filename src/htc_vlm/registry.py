"""Name -> class, for compressors, quantizers and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator


class Registry:
    """A small, explicit table of classes; a name is registered once.

    >>> methods = Registry("method")
    >>> @methods.register("mean")
    ... class Mean: ...
    >>> methods.get("mean").__name__, methods.names()
    ('Mean', ['mean'])
    >>> methods.get("median")
    Traceback (most recent call last):
    ValueError: unknown method 'median'; known: mean
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator; raises ValueError when `name` is taken by another class."""

        def add(cls: type) -> type:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is already registered by {self._classes[name].__qualname__}")
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type:
        """The class registered as `name`; ValueError lists the known names."""
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        return self._classes[name]

    def names(self) -> list[str]:
        return sorted(self._classes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
