"""The rows of a batch: how the tokens of each are chosen, what text they make, and where it ends.

`generate` knows one temperature and one limit for a batch. A LogitsProcessor and a StoppingCriteria that know the rows give
each its own, so that no decoding loop of our own is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from htc_vlm.model.compressed import CompressedImages

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Sampling:
    """How one row is answered. temperature 0: greedy. top_k 0: of all tokens. seed None: another answer each time."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0


@dataclass(frozen=True)
class Prompt:
    """What the model reads: ids with the bottleneck tokens of `images` in them, in the order of `image_ids`; over a stock
    model's images those behind them.

    n_cached: entries that come from compressed images. n_positions: what it takes of the model's context. n_tokens: what a
    client is told.
    """

    ids: tuple[int, ...]
    images: CompressedImages | None
    image_ids: tuple[str, ...]
    n_cached: int
    n_positions: int
    n_tokens: int


@dataclass(frozen=True)
class Piece:
    """Text that is new in answer `choice`; finish_reason "stop" or "length" with its last one. Or what went wrong."""

    choice: int
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None


class TextSoFar:
    """Token ids, one by one -> pieces of text that will not change any more.

    Held back: unfinished characters, what may begin a stop string, and white space at the end (answers are stripped).

    >>> words = {1: " a", 2: " b", 3: " !", 4: " c"}
    >>> text = TextSoFar(lambda ids: "".join(words[i] for i in ids), stop=["! d"])
    >>> [text.add(i) for i in (1, 2, 3, 4)], text.finish()
    (['a', ' b', '', ' ! c'], '')
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # ids before _read are text already; those from _start are decoded again with the next
        self._held, self._has_begun = "", False

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith("\ufffd"):  # amid a character of several tokens
            return ""
        if new:
            self._held += new
            self._start, self._read = self._read, len(self._ids)
        return self._release(self._certain())

    def finish(self) -> str:
        """What was held back."""
        if self.is_stopped:
            return ""
        self._held += self._new_text()
        end = self._certain()
        return self._release(end if self.is_stopped else len(self._held)).rstrip()

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _certain(self) -> int:
        """How many of the held characters can go out. Sees whether a stop string has come."""
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.is_stopped = True
            return len(self._held[: min(ends)].rstrip())
        n_kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        return len(self._held[: len(self._held) - n_kept].rstrip())

    def _release(self, end: int) -> str:
        out, self._held = self._held[:end], self._held[end:]
        if not self._has_begun:
            out = out.lstrip()
            self._has_begun = bool(out)
        return out


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that may begin `stop`.

    >>> _overlap("red\\n", "\\nUSER"), _overlap("red", "\\nUSER")
    (1, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Row:
    """One answer in the making. `cancel` may be called from any thread; the rest belongs to the model's thread."""

    def __init__(
        self, prompt: Prompt, sampling: Sampling, choice: int, decode: Decode, deliver: Callable[[Piece], None]
    ) -> None:
        self.prompt, self.sampling, self.choice, self.deliver = prompt, sampling, choice, deliver
        self.n_tokens = 0
        self.is_done = self.is_cancelled = False
        self._text = TextSoFar(decode, sampling.stop)
        self._random: torch.Generator | None = None

    def cancel(self) -> None:
        """Nobody waits for this answer any more."""
        self.is_cancelled = True

    def take(self, token: int, ends: frozenset[int]) -> Piece | None:
        """The piece that this token adds; None while nothing is certain."""
        self.n_tokens += 1
        if token in ends:
            return self.end("stop")
        text = self._text.add(token)
        if self._text.is_stopped:
            return self.end("stop", text)
        if self.n_tokens >= self.sampling.max_tokens:
            return self.end("length", text)
        return Piece(self.choice, text) if text else None

    def end(self, reason: str, text: str = "") -> Piece:
        """The last piece."""
        self.is_done = True
        return Piece(self.choice, text + self._text.finish(), reason)

    def perturb(self, scores: Tensor) -> Tensor:
        """(vocabulary,) scores -> the same with Gumbel noise: the largest is a sample at this row's temperature and top_p."""
        if self._random is None:
            self._random = torch.Generator()
            if self.sampling.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed((self.sampling.seed + 1_000_003 * self.choice) % (1 << 63))
        row: Any = scores[None]
        row = TemperatureLogitsWarper(self.sampling.temperature)(row, row)
        if self.sampling.top_k:
            row = TopKLogitsWarper(self.sampling.top_k)(row, row)
        if self.sampling.top_p < 1:
            row = TopPLogitsWarper(self.sampling.top_p)(row, row)
        noise = torch.empty(row.shape[1]).exponential_(generator=self._random).log_()
        return row[0] - noise.to(row.device)


class ChooseByRow(LogitsProcessor):
    """Gives each row its own temperature, top_p and seed, where generate takes the largest score of each."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._sampled = [(i, row) for i, row in enumerate(rows) if row.sampling.temperature > 0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for i, row in self._sampled:
            if not row.is_done:
                scores[i] = row.perturb(scores[i])
        return scores


class EndByRow(StoppingCriteria):
    """Reads each new token: hands on the text of its row, and ends every row at its own limit, stop string or hang-up."""

    def __init__(self, rows: Sequence[Row], ends: frozenset[int], post: Callable[[list[tuple[Row, Piece]]], None]) -> None:
        self._rows, self._ends, self._post = rows, ends, post

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        pieces = []
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.is_cancelled:
                row.is_done = True
            if not row.is_done:
                piece = row.take(token, self._ends)
                if piece is not None:
                    pieces.append((row, piece))
        if pieces:
            self._post(pieces)
        return torch.tensor([row.is_done for row in self._rows], device=input_ids.device)
