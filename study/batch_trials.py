"""Trials of the batch engine: a run killed twice, its memory over thousands of pictures, the same pictures by Ray.

Each returns what goes into a file below study/results/store; `python -m study store-trials NAME` runs one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from htc_vlm import ImageStore
from htc_vlm.tiny import pictograms

QUESTIONS = ("what is at the top left ?", "is there a mammal ?")
RAY_PATIENT = {  # on a busy machine Ray's processes start late, and are taken for dead
    "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "900", "RAY_worker_register_timeout_seconds": "900",
    "RAY_health_check_failure_threshold": "1000", "RAY_gcs_server_request_timeout_seconds": "900",
}  # fmt: skip


def batch(model: str, n: int = 2000, n_broken: int = 50) -> dict[str, Any]:
    """n pictures, some broken, killed twice: every row is there once."""
    out: dict[str, Any] = {"pictures": n, "broken": n_broken, "questions": len(QUESTIONS), "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as temp:
        words = _pictures(Path(temp), n, n_broken, model)
        return out | {"killed": _killed(Path(temp), n, words)}


def memory(model: str, n: int = 2000, n_broken: int = 50, marks: Sequence[int] = (100, 500, 1000, 2000)) -> dict[str, Any]:
    """One run over n pictures: its memory, and its speed so far, when so many are done."""
    out: dict[str, Any] = {"pictures": n, "broken": n_broken, "questions": len(QUESTIONS), "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as temp:
        root, at, started = Path(temp), {}, 0.0
        words = _pictures(root, n, n_broken, model)
        process = _start(root, n, "run", words)
        while process.poll() is None:
            time.sleep(0.2)
            n_done, state = _done(root / "run.out"), _memory(process.pid)
            started = started or (time.perf_counter() if n_done else 0.0)
            for mark in marks:
                if n_done >= mark and str(mark) not in at and state:
                    at[str(mark)] = {"done": n_done, **state, "seconds_since_first": round(time.perf_counter() - started, 1)}
                    print(mark, at[str(mark)], file=sys.stderr, flush=True)
        report = json.loads((root / "run.log").read_text())
        ends = {key: report[key] for key in ("rows", "pictures", "refused", "seconds", "per_second")}
        return out | {"at": at, "end": ends}


def ray(model: str, n: int = 200, n_broken: int = 5) -> dict[str, Any]:
    """n pictures by both engines: the rows are the same."""
    settings = {"HTC_VLM_RAY_CPUS": "4", **RAY_PATIENT}
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp)
        words = _pictures(root, n, n_broken, model)
        local = _run(root, n, "local", words)[0]
        spread = _run(root, n, "ray", [*words, "--engine", "ray", "--actors", "2"], settings)[0]
        rows = [(root / f"{name}.out" / "answers.jsonl").read_text().splitlines() for name in ("local", "ray")]
        with ImageStore.open(root / "local.store") as a, ImageStore.open(root / "ray.store") as b:
            same_images = sorted(a.list()) == sorted(b.list())
        return {
            "pictures": n, "broken": n_broken, "actors": 2, "load_average": os.getloadavg()[0], "rows": len(rows[1]),
            "same_rows": sum(x == y for x, y in zip(*rows, strict=True)), "same_images": same_images,
            "refused": spread["refused"], "seconds": {"local": local["seconds"], "ray": spread["seconds"]},
        }  # fmt: skip


def _pictures(root: Path, n: int, n_broken: int, model: str) -> list[str]:
    """Draws n training pictures, some broken, and writes the questions; the options that every run has."""
    (root / "q.txt").write_text("\n".join(QUESTIONS) + "\n")
    (root / f"in{n}").mkdir()
    broken = set(random.Random(0).sample(range(n), n_broken))
    for i, name in enumerate(pictograms.images("train")[:n]):
        path = root / f"in{n}" / f"{i:05}.png"
        if i in broken:
            path.write_bytes(b"no picture")
        else:
            pictograms.picture(name).save(path)
    return ["--model", model, "--questions", str(root / "q.txt"), "--max-new-tokens", "4", "--workers", "0"]


def _done(output: Path) -> int:
    """Pictures whose rows a run has committed."""
    import sqlite3

    journal = output / "answers.sqlite"
    try:
        with sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True, timeout=30) as db:
            return int(db.execute("SELECT count(DISTINCT path) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0


def _memory(pid: int) -> dict[str, int]:
    """MB that a process has now, and had at most; nothing where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"mb": found["VmRSS"], "peak_mb": found["VmHWM"]} if found else {}


def _start(
    root: Path, count: int, name: str, words: Sequence[str], more: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    start = [sys.executable, "-c", "import sys; from htc_vlm_cli import main; sys.exit(main(sys.argv[1:]))"]
    own = ["--store", str(root / f"{name}.store"), "--output", str(root / f"{name}.out")]
    command = [*start, "batch", str(root / f"in{count}"), *own, *words]
    log, errors = (root / f"{name}.log").open("wb"), (root / f"{name}.err").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=errors, env={**os.environ, **(more or {})})


def _run(
    root: Path, count: int, name: str, words: Sequence[str], more: dict[str, str] | None = None
) -> tuple[dict[str, Any], float]:
    """The report of a run, and the most memory it had, in MB."""
    process = _start(root, count, name, words, more)
    _, status, usage = os.wait4(process.pid, 0)
    code, said = os.waitstatus_to_exitcode(status), (root / f"{name}.log").read_text()
    if code not in (0, 1) or not said:
        raise RuntimeError(f"batch {name} ended with {code}: {(root / f'{name}.err').read_text()[-2000:]}")
    return json.loads(said), usage.ru_maxrss / 1024


def _killed(root: Path, n: int, words: Sequence[str]) -> dict[str, Any]:
    """kill -9 after about a fifth and after about half of the pictures, then to the end."""
    at = []
    for share in (0.2, 0.5):
        process = _start(root, n, "killed", words)
        n_done = 0
        while n_done < share * n and process.poll() is None:
            time.sleep(0.5)
            n_done = _done(root / "killed.out")
        process.kill()
        process.wait()
        at.append(n_done)
        print("killed at", n_done, file=sys.stderr, flush=True)
    report, peak = _run(root, n, "killed", words)
    rows = [json.loads(line) for line in (root / "killed.out" / "answers.jsonl").read_text().splitlines()]
    pairs = {(row["path"], row["question"]) for row in rows}
    with ImageStore.open(root / "killed.store") as store:
        n_images, n_damaged = len(store), len(store.verify())
    return {
        "at": at, "rows": len(rows), "distinct_rows": len(pairs), "expected_rows": n * len(QUESTIONS),
        "last_run": {
            "pictures": report["done_now"], "pictures_per_second": report["per_second"], "peak_mb": round(peak),
        },
        "refused": report["refused"], "images_in_store": n_images, "damaged": n_damaged,
    }  # fmt: skip
