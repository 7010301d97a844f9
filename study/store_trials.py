"""Trials of the store: writers killed, bytes flipped, 100,000 images, dtypes on 3,000 questions.

Each returns what goes into a file below study/results/store; `python -m study store-trials NAME` runs one.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from htc_vlm import CompressedImages, ImageStore, load
from htc_vlm.eval.compare import paired_bootstrap
from htc_vlm.model.answering import Answerer
from htc_vlm.model.packing import BITS, Levels, row_bytes
from htc_vlm.tiny import pictograms
from study.batch_trials import batch, memory, ray

SHAPE_7B = (32, 2, 32, 1, 128)
N_CALIBRATION = 512


def new_store(folder: Path, model: str, dtype: str = "model") -> ImageStore:
    return ImageStore.open(folder, *load(model), dtype)


def made_up(store: ImageStore, seed: int, start: int, n: int) -> tuple[list[str], CompressedImages]:
    """n ids and images that are a function of seed and number, so that any process knows what they must be."""
    about = store.about
    ids = [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(start, start + n)]
    values = [np.random.default_rng((seed, i)).standard_normal((about.layers, 2, about.n_heads, 1, about.head_dim), np.float32)
              for i in range(start, start + n)]  # fmt: skip
    return ids, CompressedImages(torch.from_numpy(np.stack(values)), about.recipe.digest, 40)


# ------------------------------------------------------------------------------------------------------------------- kill
def _write_for_ever(folder: Path, seed: int, start: int, acks: Any) -> None:
    with ImageStore.open(folder) as store:
        while True:
            ids, images = made_up(store, seed, start, 8)
            store.put(ids, images)
            acks.send(start)
            start += 8


def kill(model: str, n_rounds: int = 10) -> dict[str, Any]:
    """kill -9 of two writers, n_rounds times: what was acknowledged must be there, byte by byte."""
    context, clock = multiprocessing.get_context("fork"), random.Random(0)
    with tempfile.TemporaryDirectory() as temp:
        with new_store(Path(temp) / "s", model) as store:
            pass
        acked: dict[int, list[int]] = {1: [], 2: []}
        for _ in range(n_rounds):
            writers = []
            for seed in acked:
                here, there = context.Pipe(duplex=False)
                start = acked[seed][-1] + 8 if acked[seed] else 0
                process = context.Process(target=_write_for_ever, args=(Path(temp) / "s", seed, start, there))
                process.start()
                there.close()
                writers.append((seed, process, here))
            time.sleep(clock.uniform(0.5, 3))
            for _, process, _ in writers:
                os.kill(process.pid or 0, signal.SIGKILL)
            for seed, process, acks in writers:
                process.join()
                acked[seed] += _received(acks)
        with ImageStore.open(Path(temp) / "s") as store:
            n_acked = n_lost = n_wrong = 0
            for seed, starts in acked.items():
                for start in starts:
                    ids, images = made_up(store, seed, start, 8)
                    there = store.intact(ids)
                    n_acked, n_lost = n_acked + 8, n_lost + 8 - len(there)
                    if len(there) == 8:
                        n_wrong += sum(a != b for a, b in zip(store.get(ids).row_bytes(), images.row_bytes(), strict=True))
            return {
                "kills": 2 * n_rounds, "acknowledged": n_acked, "lost": n_lost, "wrong": n_wrong,
                "there_without_acknowledgement": len(store) - n_acked + n_lost, "damaged": len(store.verify()),
            }  # fmt: skip


def _received(acks: Any) -> list[int]:
    """What a killed process had sent."""
    out = []
    while True:
        try:
            out.append(acks.recv())
        except (EOFError, OSError):
            return out


# ----------------------------------------------------------------------------------------------------------------- damage
def damage(model: str, n_flips: int = 20, n_anywhere: int = 200) -> dict[str, Any]:
    """A byte of n_flips images flipped at once; then n_anywhere flips anywhere in the files, one at a time."""
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "s"
        with new_store(folder, model) as store:
            ids, images = made_up(store, 1, 0, 320)
            store.put(ids, images, [f"picture {i}" for i in range(320)])
        whole = dict(zip(ids, images.row_bytes(), strict=True))
        clean = {path: path.read_bytes() for path in folder.glob("*.sqlite")}
        hit = set(generator.sample(ids, n_flips))
        for id in hit:
            path = folder / f"{id[0]}.sqlite"
            content = bytearray(path.read_bytes())
            part = whole[id][:500]  # within one page of the file
            content[content.index(part) + generator.randrange(len(part))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
        with ImageStore.open(folder) as store:
            n_given, n_wrong = _given(store, whole)
            found = set(store.verify())
        out: dict[str, Any] = {
            "images": len(ids), "flipped": n_flips, "found": len(found & hit), "named_wrongly": len(found - hit),
            "given": n_given, "given_wrong": n_wrong,
        }  # fmt: skip
        _restore(folder, clean)
        told = {"harmless": 0, "images_named": 0, "file_named": 0, "given_wrong": 0, "not_found_by_verify": 0}
        for _ in range(n_anywhere):
            path = generator.choice(sorted(clean))
            content = bytearray(clean[path])
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
            with ImageStore.open(folder) as store:
                mine = {id: row for id, row in whole.items() if path.name.startswith(id[0])}
                n_given, n_wrong = _given(store, mine)
                try:
                    found, is_named = set(store.verify()), False
                except ValueError as error:
                    found, is_named = set(), path.name in str(error)
            told["given_wrong"] += n_wrong
            lost = len(mine) - n_given
            told["file_named"] += is_named
            told["images_named"] += not is_named and bool(found)
            told["harmless"] += not is_named and not found and not lost
            told["not_found_by_verify"] += not is_named and lost > len(found)
            _restore(folder, clean)
        return out | {"flips_anywhere": n_anywhere, "of_them": told}


def _given(store: ImageStore, whole: dict[str, bytes]) -> tuple[int, int]:
    """How many images are given, and how many of them are not what was put in."""
    n_given = n_wrong = 0
    for id, row in whole.items():
        try:
            n_wrong += store.get(id).row_bytes()[0] != row
            n_given += 1
        except ValueError:
            continue
    return n_given, n_wrong


def _restore(folder: Path, clean: dict[Path, bytes]) -> None:
    for file in folder.glob("*.sqlite-*"):
        file.unlink()
    for path, content in clean.items():
        path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------- entries
def _read_for_ever(folder: Path, ids: Sequence[str], stop: Any, answer: Any) -> None:
    times, chosen = [], random.Random(os.getpid())
    with ImageStore.open(folder) as store:
        while not stop.is_set():
            id = chosen.choice(ids)
            started = time.perf_counter()
            store.get(id)
            times.append(time.perf_counter() - started)
    answer.put(times)


def entries(model: str, n: int = 100_000, dtypes: Sequence[str] = ("model", "int4")) -> dict[str, Any]:
    """n images: bytes on disk, rows a second written, milliseconds a read; alone, and two reading while one writes."""
    return {"images": n, "load_average": os.getloadavg()[0], "dtypes": {dtype: _entries(model, n, dtype) for dtype in dtypes}}


def _entries(model: str, n: int, dtype: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temp, new_store(Path(temp) / "s", model, dtype) as store:
        _, images = made_up(store, 0, 0, 512)
        images = images.as_dtype(dtype) if dtype != "model" else images
        ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)]
        started = time.perf_counter()
        for start in range(0, n, 512):
            some = ids[start : start + 512]
            store.put(some, images[: len(some)])
        written = time.perf_counter() - started
        store.close()
        nbytes = store.nbytes_on_disk
        reads = _times(lambda: store.get(random.choice(ids)), 2000)
        of_32 = _times(lambda: store.get(random.sample(ids, 32)), 300)
        started = time.perf_counter()
        n_damaged = len(store.verify())
        verified = time.perf_counter() - started
        stop, answer = context.Event(), context.Queue()
        readers = [context.Process(target=_read_for_ever, args=(Path(temp) / "s", ids, stop, answer)) for _ in range(2)]
        for one in readers:
            one.start()
        started, n_more = time.perf_counter(), 0
        while time.perf_counter() - started < 20:
            more = [hashlib.sha256(f"more {n_more + i}".encode()).hexdigest() for i in range(512)]
            store.put(more, images)
            n_more += 512
        writing = time.perf_counter() - started
        stop.set()
        both = np.array([one for _ in readers for one in answer.get()])
        for one in readers:
            one.join()
        return {
            "bytes_per_image": store.get(ids[0]).nbytes, "mb_on_disk": round(nbytes / 1e6, 1),
            "disk_per_payload": round(nbytes / n / store.get(ids[0]).nbytes, 2), "rows_per_second": round(n / written),
            "read_ms": _spread(reads), "read_32_ms": _spread(of_32), "verify_seconds": round(verified, 1),
            "damaged": n_damaged,
            "two_readers_one_writer": {
                "read_ms": _spread(both), "reads": len(both), "rows_per_second": round(n_more / writing),
            },
        }  # fmt: skip


def _times(act: Callable[[], Any], n: int) -> np.ndarray:
    act()
    out = []
    for _ in range(n):
        started = time.perf_counter()
        act()
        out.append(time.perf_counter() - started)
    return np.array(out)


def _spread(seconds: np.ndarray) -> dict[str, float]:
    """Milliseconds: median, 99th percentile, most."""
    return {
        "median": round(1e3 * float(np.median(seconds)), 3), "p99": round(1e3 * float(np.quantile(seconds, 0.99)), 3),
        "most": round(1e3 * float(seconds.max()), 3),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- dtypes
def dtypes(model: str, n_questions: int = 3000) -> dict[str, Any]:
    """Bytes an image and points lost of each dtype, paired against the model's own, on seen and unseen drawings."""
    answerer = Answerer(*load(model))
    images = _encoded(answerer, pictograms.images("train")[:N_CALIBRATION])
    levels = Levels.fit(images.kv)
    out: dict[str, Any] = {"model": model, "recipe": answerer.recipe().digest, "calibrated_on": N_CALIBRATION}
    for split in ("test", "test-unseen"):
        asked = pictograms.questions(split)[:n_questions]
        names = list(dict.fromkeys(one.image for one in asked))
        kept = _encoded(answerer, names)
        which = [names.index(one.image) for one in asked]
        rows: dict[str, Any] = {}
        first: list[str] = []
        for dtype in ("model", *BITS):
            stored = kept if dtype == "model" else kept.as_dtype(dtype, levels if dtype == "int2" else None)
            given: list[str] = []
            for start in range(0, len(asked), 64):
                part = slice(start, start + 64)
                given += answerer.ask(stored, which[part], [one.text for one in asked[part]], 4)
            first = first or given
            marks = [[float(answer == one.answer) for answer, one in zip(said, asked, strict=True)] for said in (first, given)]
            lost = paired_bootstrap(*marks, [one.image for one in asked])
            rows[dtype] = {
                "bytes_per_image": stored[0].nbytes, "right": round(100 * float(np.mean(marks[1])), 2),
                "points_lost": round(lost.points, 2), "low": round(lost.low, 2), "high": round(lost.high, 2),
                "same_answers": round(100 * float(np.mean([a == b for a, b in zip(first, given, strict=True)])), 2),
            }  # fmt: skip
            print(split, dtype, rows[dtype], file=sys.stderr, flush=True)
        out[split] = {"questions": len(asked), "pictures": len(names), "dtypes": rows}
    full = 2 * int(np.prod(SHAPE_7B))
    out["computed_at_7b"] = {"bfloat16": full, **{dtype: row_bytes(SHAPE_7B, dtype) for dtype in BITS}}
    return out


def _encoded(answerer: Answerer, names: Sequence[str]) -> CompressedImages:
    parts = []
    for start in range(0, len(names), 32):
        images = answerer.encode([pictograms.picture(name) for name in names[start : start + 32]])
        assert isinstance(images, CompressedImages)
        parts.append(images)
    return CompressedImages.concat(parts)


TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    "kill": kill, "damage": damage, "entries": entries, "dtypes": dtypes, "batch": batch, "memory": memory, "ray": ray
}  # fmt: skip
