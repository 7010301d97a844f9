"""What the server accepts at most, and how it batches: one home for all its numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """All positive. Sizes in bytes, times in seconds unless the name says otherwise.

    max_batch: rows of one batch; max_batch_positions: rows times the longest row (prompt and answer) of one batch.
    wait_ms: how long the first row of a batch waits for others. max_encode: pictures compressed at once.
    max_queue: rows that wait; beyond, 429. max_requests, max_bodies: requests and bytes of bodies held at once; beyond, 429.
    max_body, max_pixels: of one request and one picture. max_images, max_choices, max_tokens: of one request.
    default_tokens: max_tokens where a request says nothing. memory: of compressed images of pictures that came in a
    question and are not in the store. body_seconds: how long a body may take to arrive.
    """

    max_batch: int = 32
    max_batch_positions: int = 65_536
    wait_ms: int = 3
    max_encode: int = 16
    max_queue: int = 256
    max_requests: int = 512
    max_bodies: int = 512 << 20
    max_body: int = 32 << 20
    max_pixels: int = 25_000_000
    max_images: int = 16
    max_choices: int = 8
    max_tokens: int = 512
    default_tokens: int = 64
    memory: int = 64 << 20
    body_seconds: int = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("wait_ms", "memory") else 1
            if value < least:
                raise ValueError(f"{field.name} is {value}; give at least {least}")
