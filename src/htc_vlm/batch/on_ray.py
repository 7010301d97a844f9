"""The same two steps on Ray Data: tasks decode, a pool of actors compresses and asks, each into a store of its own.

Source:  docs.ray.io, Ray Data's map_batches with ActorPoolStrategy.
Differs: Ray's own checkpoints keep all ids in memory, read all input again (ray issue 65891) and hang without a word on two
         CPUs; here the driver's journal says what is done, and only the rest is given to Ray.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from htc_vlm.batch.steps import Columns, CompressAndAsk, Decode, Settings
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.store import ImageStore

LOCK = "lock"
LEAST_CPUS = 4  # with fewer, an actor and the tasks that feed it wait for each other for ever


def engine(batches: Sequence[Columns], settings: Settings, n_actors: int = 2) -> Iterator[Columns]:
    """Rows of each batch, as they come. The actors' stores are merged into the run's when it ends, or when it goes on.

    All nodes must see the source and the store's parent folder. ValueError on fewer than 4 CPUs.
    """
    merge_workers(settings)
    if not batches:
        return
    with _run_folder(settings) as folder:
        yield from _asked(batches, settings, n_actors, folder)
    merge_workers(settings)


def _asked(batches: Sequence[Columns], settings: Settings, n_actors: int, folder: Path) -> Iterator[Columns]:
    ray = _ray()
    n_cpus = int(ray.cluster_resources().get("CPU", 0))
    if n_cpus < LEAST_CPUS:
        raise ValueError(f"Ray has {n_cpus} CPUs; with fewer than {LEAST_CPUS} it can wait for ever: use --engine local")
    if n_actors > n_cpus - 2:
        raise ValueError(f"{n_actors} actors leave no CPUs of {n_cpus} to read pictures; give at most {n_cpus - 2}")
    batch_size = max(len(batch["name"]) for batch in batches)
    rows = [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["name"]))]
    data = ray.data.from_items(rows, override_num_blocks=max(1, min(len(batches), 200)))
    data = data.map_batches(Decode(settings), batch_size=batch_size, num_cpus=1)
    data = data.map_batches(
        OwnStore, fn_constructor_args=(settings, folder), batch_size=batch_size, num_cpus=1,
        num_gpus=1 if settings.device.startswith("cuda") else 0,
        compute=ray.data.ActorPoolStrategy(size=n_actors),
    )  # fmt: skip
    with ImageStore.open(settings.store) as store:
        for found in data.iter_batches(batch_size=None, batch_format="numpy"):
            store.name(
                [
                    (str(p), str(id))
                    for p, id, error in zip(found["path"], found["id"], found["error"], strict=True)
                    if not error
                ]
            )
            yield found


class OwnStore(CompressAndAsk):
    """`CompressAndAsk` into a store of its own, in the run's folder: SQLite on a network's disk has one writer."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        own = folder / uuid.uuid4().hex
        self.shared = ImageStore.open(settings.store, read_only=True)
        super().__init__(
            settings,
            lambda model, processor: ImageStore.open(
                own, model, processor, self.shared.about.dtype, method=self.shared.method, maps=settings.maps,
                levels=self.shared.about.levels,
            ),
        )

    def _name(self, named: list[tuple[str, str]]) -> None:
        """The driver does, in the run's store."""

    def _images(self, ids: list[str]) -> Any:
        here = self.store.intact(ids)
        parts = [(self.store if id in here else self.shared).get([id]) for id in ids]
        if self.is_stock:
            return parts
        return CompressedImages.concat(parts) if parts else None


def _workers(settings: Settings) -> Path:
    return Path(f"{Path(settings.store).absolute()}.workers")


@contextmanager
def _run_folder(settings: Settings) -> Iterator[Path]:
    """Where the actors of this run keep their stores; locked as long as it goes on, whatever ends it."""
    name = uuid.uuid4().hex
    folder, hidden = _workers(settings) / name, _workers(settings) / f".{name}"
    hidden.mkdir(parents=True)
    with _locked(hidden):
        hidden.rename(folder)  # seen by other runs once it is locked
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Did this process get a run's folder for itself?"""
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def merge_workers(settings: Settings) -> int:
    """Take over what actors of runs that have ended kept in stores of their own; how many images."""
    folder, n_new = _workers(settings), 0
    for run in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not run.is_dir() or run.name.startswith("."):
            continue
        with _locked(run) as is_ours:
            if not is_ours:  # another run is at work, with actors of its own
                continue
            with ImageStore.open(settings.store) as store:
                for one in (run, *sorted(run.iterdir())):  # the run itself: as an earlier version kept them
                    if (one / "store.json").exists():
                        with ImageStore.open(one) as own:  # not read-only: a killed actor left its log
                            n_new += store.merge(own)
            shutil.rmtree(run)
    with suppress(OSError):  # not empty: another run's
        folder.rmdir()
    return n_new


def _ray() -> Any:
    """Ray, started on this machine unless a cluster is at hand. ImportError that says what to install."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray; install it with pip install 'htc-vlm[ray]'") from error
    if not ray.is_initialized():
        variables = {
            name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ
        }
        address = os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": _cpus()}
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": variables}, **own)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _cpus() -> int | None:
    """$HTC_VLM_RAY_CPUS, for machines whose count Ray gets wrong; None: as Ray counts."""
    given = os.environ.get("HTC_VLM_RAY_CPUS")
    return int(given) if given else None
