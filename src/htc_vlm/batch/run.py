"""Runs a batch: lists what is to be done, leaves out what is done, and commits each batch of rows as it comes.

Source:  ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.batch.journal import Journal
from htc_vlm.batch.questions import Questions, names_of
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
    refs, folder = refs_of(source), Path(source)
    model, store = find(settings.model).absolute(), Path(settings.store).absolute()
    settings = replace(settings, model=str(model), store=str(store))
    recipe = _make_store(settings)
    about = {"questions": questions.digest, "recipe": recipe, "max_new_tokens": settings.max_new_tokens}
    started = time.perf_counter()
    with Journal(output, about) as journal:
        done = journal.done()
        places = {ref.name: place for place, ref in enumerate(refs)}
        _tell_missing(journal, questions, refs, folder, places)
        todo = [(ref, asked) for ref in refs if ref.name not in done and (asked := questions.about(ref, folder))]
        batches = [
            columns_of(*zip(*todo[start : start + batch_size], strict=True)) for start in range(0, len(todo), batch_size)
        ]
        with tqdm(total=len(todo), disable=not progress, unit=" pictures", smoothing=0.05) as bar:
            for rows in engine(batches, settings):
                journal.add(rows, places)
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


def _tell_missing(journal: Journal, questions: Questions, refs: Sequence[Ref], folder: Path, places: dict[str, int]) -> None:
    """Rows about pictures that the source does not have: each is there, with its error."""
    known = {name for ref in refs for name in names_of(ref, folder)}
    for picture in [name for name in questions.rows if name not in known]:
        asked = list(questions.rows[picture])
        error = f"{picture}: is not among the pictures of the source"
        rows: dict[str, Any] = {
            "path": [picture] * len(asked), "id": [""] * len(asked), "number": list(range(len(asked))), "question": asked,
            "answer": [""] * len(asked), "error": [error] * len(asked),
        }  # fmt: skip
        journal.add(rows, {**places, picture: len(places)})
