"""Counters of one server, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All under the prefix htc_vlm_; each server has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"htc_vlm_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"htc_vlm_{name}", what, buckets=buckets, registry=self.registry)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"htc_vlm_{name}", what, registry=self.registry)

        self.requests = counter("requests", "HTTP requests", "route", "status")
        self.batches = counter("batches", "batches that were generated")
        self.hang_ups = counter("hang_ups", "answers whose client went away")
        self.prompt_tokens = counter("prompt_tokens", "tokens read, those of compressed images included")
        self.completion_tokens = counter("completion_tokens", "tokens generated")
        self.encoded = counter("images_encoded", "pictures compressed")
        self.reused = counter("images_reused", "pictures of questions that were compressed before")
        self.request_seconds = histogram("chat_seconds", "from a chat request to the end of its answer", SECONDS)
        self.first_token_seconds = histogram("first_token_seconds", "from a chat request to its first text", SECONDS)
        self.batch_rows = histogram("batch_rows", "rows of a batch", ROWS)
        self.waiting = gauge("waiting_rows", "rows that wait for a batch")
        self.running = gauge("running_rows", "rows of the batch that runs")
        self.alive = gauge("model_alive", "1 while the model's thread lives")

    def text(self) -> bytes:
        return generate_latest(self.registry)
