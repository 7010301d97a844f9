"""Runs a batch: lists what is to be done, leaves out what is done, and commits each batch of rows as it comes.

Source:  ours.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.batch.journal import Journal, Kept, check_folder
from htc_vlm.batch.questions import Questions
from htc_vlm.batch.sources import Ref, refs_of
from htc_vlm.batch.steps import Columns, Settings, columns_of, store_of
from htc_vlm.model.loading import find, load

Engine = Callable[[Sequence[Columns], Settings], Iterator[Columns]]


@dataclass(frozen=True)
class Report:
    """rows, pictures, refused: of the whole output. done_now: pictures of this run. per_second: of this run."""

    output: str
    rows: int
    pictures: int
    refused: int
    done_now: int
    seconds: float
    per_second: float
    reasons: list[str]  # why pictures were refused, the first five


def run(
    source: str, questions: Questions, output: Path, settings: Settings, engine: Engine,
    batch_size: int = 32, kind: str = "jsonl", progress: bool = False,
) -> Report:  # fmt: skip
    """Compress the pictures of a source into a store, and ask; start it again to go on. ValueError for what cannot be run."""
    check_folder(output)
    refs = refs_of(source)
    model, store = find(settings.model).absolute(), Path(settings.store).absolute()
    settings = replace(settings, model=str(model), store=str(store))
    recipe = _make_store(settings)
    about = {
        "source": _written(source), "questions": questions.digest, "recipe": recipe, "max_new_tokens": settings.max_new_tokens,
    }  # fmt: skip
    started = time.perf_counter()
    with Journal(output, about) as journal:
        kept = journal.kept()
        places = {ref.name: place for place, ref in enumerate(refs)}
        gone = [path for path, one in kept.items() if path not in places and not one.has_error]
        asked, strange = questions.about(refs, _folder(source), gone)
        stale = [path for path, one in kept.items() if path not in asked and (questions.rows or one.has_error)]
        journal.drop(stale)  # of pictures that were not there, or were the one of that name
        _tell(journal, questions, strange, places)
        stamps = _stamps(refs)
        touched = {ref.name: stamps[ref.name] for ref in refs if _is_done(ref, asked, kept, stamps[ref.name])}
        journal.stamp({name: stamp for name, stamp in touched.items() if stamp and stamp != kept[name].stamp})
        todo = [(ref, asked[ref.name]) for ref in refs if ref.name in asked and ref.name not in touched]
        batches = [
            columns_of(*zip(*todo[start : start + batch_size], strict=True)) for start in range(0, len(todo), batch_size)
        ]
        with tqdm(total=len(todo), disable=not progress, unit=" pictures", smoothing=0.05) as bar:
            for rows in engine(batches, settings):
                journal.add(rows, places, stamps)
                bar.update(len(set(rows["path"])))
        seconds = time.perf_counter() - started
        file = journal.write(kind)
        return Report(str(file), **journal.counts(), done_now=len(todo), seconds=round(seconds, 2),
                      per_second=round(len(todo) / seconds, 2), reasons=journal.reasons(5))  # fmt: skip


def _make_store(settings: Settings) -> str:
    """Make the store, or see that it is of this model, before any process works on it; the recipe's digest."""
    model, processor = load(settings.model)
    with store_of(settings, model, processor) as store:
        return store.about.recipe.digest


def _written(source: str) -> str:
    """A source as its pictures' names begin: a relative one with the folder that it is relative to."""
    plain = os.path.normpath(source)
    return plain if os.path.isabs(plain) else f"{plain} in {os.getcwd()}"


def _folder(source: str) -> Path:
    """What rows' names are below: the folder, the tar or parquet file, or the folder of a list."""
    path = Path(source)
    return path.parent if path.suffix.lower() in (".txt", ".list") and path.is_file() else path


def _stamps(refs: Sequence[Ref]) -> dict[str, str]:
    files: dict[str, str] = {}  # many pictures of one tar: one look
    return {ref.name: files[ref.path] if ref.path in files else files.setdefault(ref.path, ref.stamp) for ref in refs}


def _is_done(ref: Ref, asked: Mapping[str, list[str]], kept: Mapping[str, Kept], stamp: str) -> bool:
    """Are the journal's rows the right ones of this picture, as its file is now? One that cannot be read any more has its."""
    one = kept.get(ref.name)
    if one is None or one.has_error or one.questions != tuple(asked.get(ref.name, ())):
        return False
    if stamp == one.stamp:
        return True
    try:
        return hashlib.sha256(ref.read()).hexdigest() == one.id
    except (OSError, ValueError):
        return True


def _tell(journal: Journal, questions: Questions, strange: Mapping[str, str], places: Mapping[str, int]) -> None:
    """Rows about pictures that the source does not have, or has several of: each is there, with its error."""
    for place, (picture, error) in enumerate(strange.items(), len(places)):
        asked = list(questions.rows[picture])
        rows: dict[str, Any] = {
            "path": [picture] * len(asked), "id": [""] * len(asked), "number": list(range(len(asked))), "question": asked,
            "answer": [""] * len(asked), "error": [error] * len(asked),
        }  # fmt: skip
        journal.add(rows, {picture: place})
