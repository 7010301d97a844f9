"""The model's thread: puts the rows that wait into batches, and runs everything that touches the model.

Source:  ours, around transformers' `generate` (static batches: rows join between batches, and leave at any step).
Differs: engines that let rows join at any step (vLLM, SGLang) own their decoding loop and cache; here a row that arrives
         while a batch runs waits for the batch's longest answer.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.generation_options import greedy, greedy_config
from htc_vlm.serve.errors import Refusal, busy, model_is_dead
from htc_vlm.serve.limits import Limits
from htc_vlm.serve.metrics import Metrics
from htc_vlm.serve.rows import ChooseByRow, EndByRow, Piece, Row

log = logging.getLogger("htc_vlm.serve")
Together = Callable[[list[Any]], Sequence[Any]]


class Engine:
    """Owns the model: `submit` rows, or give `together` things to be done between two batches.

    Only the thread that `start` makes calls the model. `stop` finishes all that waits.
    """

    def __init__(self, model: Any, processor: Any, limits: Limits, metrics: Metrics) -> None:
        self.model, self.processor, self.limits, self.metrics = model, processor, limits, metrics
        self._changed = threading.Condition()
        self._rows: deque[Row] = deque()
        self._running: list[Row] = []
        self._tasks: deque[tuple[Together, Any, Future[Any]]] = deque()
        self._is_stopping = self._is_dead = False
        self._batch_seconds = 0.1  # moving mean
        self._thread = threading.Thread(target=self._run, name="htc-vlm-model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        # What a checkpoint says of sampling is the requests' default (see chat.py); rows choose by ChooseByRow.
        self.own = copy.deepcopy(model.generation_config)
        check_sampling(self.own)
        self._config = config = greedy_config(self.own)
        ends = config.eos_token_id
        self._ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        fillers = (config.pad_token_id, processor.tokenizer.pad_token_id, *sorted(self._ends), 0)
        self._pad = next(one for one in fillers if one is not None)

    # ---------------------------------------------------------------- from the event loop
    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.metrics.alive.set(1)
        self._thread.start()

    async def stop(self) -> None:
        """Finishes what waits, then ends the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_dead

    @property
    def n_waiting(self) -> int:
        return len(self._rows)

    def check_room(self, n_rows: int) -> None:
        """Refusal 429 where `n_rows` more find no place to wait, 503 where nobody would answer them."""
        if not self.is_alive:
            raise model_is_dead()
        if len(self._rows) + n_rows > self.limits.max_queue:
            n_batches = math.ceil(len(self._rows) / self.limits.max_batch)
            raise busy(min(60, max(1, math.ceil(n_batches * self._batch_seconds))), f"{len(self._rows)} answers are waited for")

    def submit(self, rows: Sequence[Row]) -> None:
        """All rows or none: see `check_room`."""
        with self._changed:
            self.check_room(len(rows))
            self._rows.extend(rows)
            self.metrics.waiting.set(len(self._rows))
            self._changed.notify_all()

    async def together(self, call: Together, item: Any) -> Any:
        """call([item, ...])'s result for this item, in the model's thread, with others that wait for the same call."""
        done: Future[Any] = Future()
        with self._changed:
            if not self.is_alive:
                raise model_is_dead()
            self._tasks.append((call, item, done))
            self._changed.notify_all()
        return await asyncio.wrap_future(done)

    # ---------------------------------------------------------------- in the model's thread
    def _run(self) -> None:
        try:
            while self._wait():
                self._run_tasks(self._next_tasks())
                self._run_rows(self._next_rows())
        except BaseException:
            log.exception("the model's thread has ended")
        finally:
            self._end()

    def _wait(self) -> bool:
        """Until there is something to do; False when all is done and nothing more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._tasks or self._is_stopping)
            if not self._tasks and not self._is_stopping:  # the first row waits a little for others
                self._changed.wait_for(
                    lambda: len(self._rows) >= self.limits.max_batch or self._tasks, self.limits.wait_ms / 1000
                )
            return bool(self._rows or self._tasks)

    def _next_tasks(self) -> list[tuple[Together, Any, Future[Any]]]:
        """The first task, and others of its kind."""
        with self._changed:
            if not self._tasks:
                return []
            call = self._tasks[0][0]
            chosen = [task for task in self._tasks if task[0] == call][: self.limits.max_encode]
            taken = set(map(id, chosen))
            self._tasks = deque(task for task in self._tasks if id(task) not in taken)
        return [task for task in chosen if task[2].set_running_or_notify_cancel()]

    def _run_tasks(self, tasks: list[tuple[Together, Any, Future[Any]]]) -> None:
        if not tasks:
            return
        try:
            results = tasks[0][0]([item for _, item, _ in tasks])
        except Exception as error:
            if len(tasks) == 1:
                tasks[0][2].set_exception(error)
            else:  # the others shall not suffer from one
                for task in tasks:
                    self._run_tasks([task])
            return
        except BaseException:  # the thread ends, and nobody else knows of these
            for _, _, done in tasks:
                done.set_exception(model_is_dead())
            raise
        for (_, _, done), result in zip(tasks, results, strict=True):
            done.set_result(result)

    def _next_rows(self) -> list[Row]:
        """First come, first served, as many as a batch holds; images of another number of entries wait for the next."""
        chosen: list[Row] = []
        left: deque[Row] = deque()
        longest, sizes = 0, set[int]()
        with self._changed:
            while self._rows and len(chosen) < self.limits.max_batch:
                row = self._rows.popleft()
                if row.is_cancelled:
                    continue
                size = self._sizes(row)
                if len(sizes | size) > 1:
                    left.append(row)
                    continue
                longest = max(longest, row.prompt.n_positions + row.sampling.max_tokens)
                if chosen and longest * (len(chosen) + 1) > self.limits.max_batch_positions:
                    left.append(row)
                    break
                chosen.append(row)
                sizes |= size
            self._rows.extendleft(reversed(left))
            self.metrics.waiting.set(len(self._rows))
        return chosen

    def _run_rows(self, rows: list[Row]) -> None:
        if not rows:
            return
        start, self._running = time.perf_counter(), rows
        self.metrics.batches.inc()
        self.metrics.batch_rows.observe(len(rows))
        self.metrics.running.set(len(rows))
        try:
            self._generate(rows)
            self._post([(row, row.end("length")) for row in rows if not row.is_done])
        except Exception as error:
            self._recover(rows, error)
        self._batch_seconds += 0.2 * (time.perf_counter() - start - self._batch_seconds)
        self.metrics.running.set(0)
        self.metrics.completion_tokens.inc(sum(row.n_tokens for row in rows))

    def _recover(self, rows: list[Row], error: Exception) -> None:
        """Rows of a batch that failed are tried alone, where nothing of them was sent yet."""
        left = [row for row in rows if not row.is_done]
        if len(rows) > 1:
            log.warning("a batch of %d rows failed (%s); trying each alone", len(rows), error)
            for row in left:
                if row.n_tokens == 0 and not row.is_cancelled:
                    self._run_rows([row])
        elif not isinstance(error, ValueError):
            log.error("an answer failed", exc_info=error)
        self._post([(row, _failed(row, error)) for row in left if not row.is_done])

    @torch.inference_mode()
    def _generate(self, rows: list[Row]) -> None:
        """One batch."""
        with greedy(self.model):
            self.model.generate(
                **self._inputs(rows),
                generation_config=self._config_for(rows),
                stopping_criteria=StoppingCriteriaList([EndByRow(rows, self._ends, self._post)]),
                logits_processor=LogitsProcessorList([ChooseByRow(rows)]),
            )

    def _sizes(self, row: Row) -> set[int]:
        """Entries of a row's images: rows of one batch have at most one number of them."""
        return set() if row.prompt.images is None else {row.prompt.images.n_bottleneck}

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What `generate` is given: left-padded prompts, and their images."""
        device = self.model.device
        longest = max(len(row.prompt.ids) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row.prompt.ids) :] = torch.tensor(row.prompt.ids)
            mask[i, longest - len(row.prompt.ids) :] = 1
        images = images_of(rows)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        return inputs if images is None else {**inputs, "compressed": images}

    def _config_for(self, rows: list[Row]) -> Any:
        config = copy.copy(self._config)
        config.max_new_tokens = max(row.sampling.max_tokens for row in rows)
        return config

    def _post(self, pieces: list[tuple[Row, Piece]]) -> None:
        """Hands pieces to the event loop, all of a step at once."""
        if pieces and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, pieces)

    def _end(self) -> None:
        """Whoever still waits is told that nobody will answer."""
        with self._changed:
            self._is_dead = True
            rows = [row for row in (*self._running, *self._rows) if not row.is_done]
            tasks = list(self._tasks)
            self._rows.clear()
            self._tasks.clear()
        self.metrics.alive.set(0)
        self.metrics.waiting.set(0)
        for _, _, done in tasks:
            if done.set_running_or_notify_cancel():
                done.set_exception(model_is_dead())
        self._post([(row, _failed(row, model_is_dead())) for row in rows])


def check_sampling(own: GenerationConfig) -> None:
    """ValueError for a checkpoint that samples in a way that rows cannot; others would be served as what they are not."""
    if not own.do_sample:
        return
    for name, neutral in {"min_p": 0, "top_h": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}.items():
        if (value := getattr(own, name, None)) not in (None, neutral):
            raise ValueError(
                f"this checkpoint's generation_config samples with {name}={value}; the server knows temperature, top_p and "
                f"top_k: set {name} to null in generation_config.json"
            )


def images_of(rows: Sequence[Row]) -> CompressedImages | None:
    """The images of all rows, in order; one alone where all rows ask about the same, which generate shares."""
    parts = [row.prompt.images for row in rows if row.prompt.images is not None]
    if not parts:
        return None
    if len(parts) == len(rows) and len({row.prompt.image_ids for row in rows}) == 1 and len(parts[0]) == 1:
        return parts[0]
    return CompressedImages.concat(parts)


def _failed(row: Row, error: Exception) -> Piece:
    row.is_done = True
    return Piece(row.choice, error=error)


def _deliver(pieces: list[tuple[Row, Piece]]) -> None:
    for row, piece in pieces:
        row.deliver(piece)


def refusal(error: Exception) -> Refusal:
    """What a client is told of an error: a ValueError of this library says what was wrong with the request."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValueError):
        return Refusal(400, str(error), "invalid_request")
    return Refusal(500, "the answer failed; the server's log says why", "internal_error")
