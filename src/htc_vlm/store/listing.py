"""Lists a store's images, oldest first: a page costs what the page holds, however many there are behind it.

Source:  sqlite.org, row values ("scrolling window queries"); an index over (added, id) in each shard.
Differs: sixteen shards are read in step, each from where the page begins.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Iterator
from contextlib import suppress

from htc_vlm.store.entries import StoredImage
from htc_vlm.store.rows import IN_ORDER, UnknownImageError, is_key, name_as_stored
from htc_vlm.store.shards import N_SHARDS, READ_AT_ONCE, Shards

Entry = tuple[float, bytes, int]  # when added, id, bytes
SELECT = "SELECT added, id, length(kv) + length(seen) FROM images WHERE (added, id) > (?, ?) ORDER BY added, id LIMIT ?"


def listed(shards: Shards, limit: int | None, name: str | None, after: bytes | None) -> list[StoredImage]:
    """At most `limit` images behind the image `after`, whose names contain `name`. UnknownImageError."""
    at = (0.0, b"") if after is None else (added_at(shards, after), after)
    wanted = None if name is None else with_name(shards, name)
    size = READ_AT_ONCE if limit is None else max(1, min(READ_AT_ONCE, limit))
    entries = list(_one_after_another(shards, at, size, limit, wanted))
    found: list[StoredImage] = []
    for start in range(0, len(entries), READ_AT_ONCE):
        some = entries[start : start + READ_AT_ONCE]
        names = shards.names([id for _, id, _ in some])
        given = [StoredImage.of(id, names[id], nbytes, added) for added, id, nbytes in some]
        found += [one for one in given if name is None or any(name in own for own in one.names)]
    return found


def _one_after_another(
    shards: Shards, at: tuple[float, bytes], size: int, limit: int | None, wanted: set[bytes] | None
) -> Iterator[Entry]:
    """The entries behind a place, up to `limit`; of those whose ids are wanted."""
    n_given = 0
    if limit is not None and limit < 1:
        return
    for entry in heapq.merge(*(_of_shard(shards, shard, at, size) for shard in range(N_SHARDS))):
        if wanted is None or entry[1] in wanted:
            yield entry
            n_given += 1
            if n_given == limit:
                return


def _of_shard(shards: Shards, shard: int, at: tuple[float, bytes], size: int) -> Iterator[Entry]:
    """One shard's entries behind a place, oldest first; without holding a transaction open."""
    _index(shards, shard)
    while True:
        records = shards.select(shard, SELECT, (*at, size))
        for added, id, nbytes in records:
            if is_key(id) and isinstance(added, float):  # a damaged one is `damaged`'s
                yield added, id, nbytes
        if len(records) < size:
            return
        at = records[-1][0], records[-1][1]


def _index(shards: Shards, shard: int) -> None:
    """Make the index in a store of before there was one; where that cannot be, listing is slow and right."""
    with suppress(sqlite3.Error):
        db = None if shards.read_only else shards._connect(shard, create=False)
        if db is not None:
            db.execute(IN_ORDER)


def added_at(shards: Shards, id: bytes) -> float:
    """When an image was added. UnknownImageError."""
    records = shards.select(id[0] >> 4, "SELECT added FROM images WHERE id = ?", (id,))
    if not records:
        raise UnknownImageError(f"{shards.folder}: no image {id.hex()}, so nothing comes after it")
    return float(records[0][0])


def with_name(shards: Shards, part: str) -> set[bytes]:
    """Ids of images with a name that contains `part`; all names are looked at."""
    found: set[bytes] = set()
    for shard in range(N_SHARDS):
        records = shards.select(shard, "SELECT DISTINCT id FROM names WHERE instr(name, ?)", (name_as_stored(part),))
        found |= {id for (id,) in records if is_key(id)}
    return found
