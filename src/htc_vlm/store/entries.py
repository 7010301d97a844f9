"""What a store answers with: ids that know what was left out, and what they stand for.

Source:  ours.
"""

from __future__ import annotations

from collections.abc import Iterable


class Added(list[str]):
    """Ids of the pictures that `add` kept, in order. refused: (name or number, reason) of those it could not read."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        super().__init__(ids)
        self.refused: list[tuple[str, str]] = []
        self.n_new = 0  # compressed now; the others were there


class StoredImage(str):
    """An image's id, with its names, bytes and the time it was added (seconds since 1970)."""

    names: list[str]
    nbytes: int
    added: float

    @classmethod
    def of(cls, id: bytes, names: list[str], nbytes: int, added: float) -> StoredImage:
        entry = cls(id.hex())
        entry.names, entry.nbytes, entry.added = names, nbytes, added
        return entry
