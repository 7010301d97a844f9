"""Time and the journal: how every number of benchmarks/real_size.py is taken and kept.

Source:  CUDA events around each call, the device idle before it.
Differs: nothing known.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from real_size.floors import Ceilings, Work

Call = Callable[[], object]


def median(values: list[float]) -> float:
    """The middle value; of an even number, the upper one of the middle two."""
    return sorted(values)[len(values) // 2]


def time_in_turn(calls: dict[str, Call], device: torch.device, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call: one of each in every round, so that a busy machine disturbs them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            elapsed = time_once(call, device)
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def time_once(call: Call, device: torch.device) -> float:
    """Milliseconds from the start of the call until the device has finished its work."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))


def entry(times: list[float], work: Work, ceilings: Ceilings, **more: Any) -> dict[str, Any]:
    """One measured call, its floor beside it."""
    ms = median(times)
    floor, bound = ceilings.floor_ms(work)
    return {
        "ms": ms,
        "ms_min": min(times),
        "ms_max": max(times),
        "flops": work.flops,
        "floor_ms": floor,
        "floor_by": bound,
        "times_floor": ms / floor,
        "tflops": work.flops / ms / 1e9,
        "share_of_matmul_ceiling": work.flops / ms / 1e9 / ceilings.matmul_tflops,
        **more,
    }


def measure_ceilings(device: torch.device, dtype: torch.dtype, side: int, copy_mib: int) -> Ceilings:
    """Random data: zeros run faster than real values on some devices."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    b, product = torch.randn_like(a), torch.empty_like(a)
    matmul = time_in_turn({"matmul": lambda: torch.matmul(a, b, out=product)}, device, warmup=5, repeats=20)["matmul"]
    source = torch.randn(copy_mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    copy = time_in_turn({"copy": lambda: target.copy_(source)}, device, warmup=3, repeats=10)["copy"]
    return Ceilings(
        matmul_tflops=2 * side**3 / median(matmul) / 1e9, copy_gb_per_s=2 * source.nbytes / median(copy) / 1e6
    )


def captured(call: Callable[[], torch.Tensor]) -> tuple[Call, torch.Tensor]:
    """A CUDA graph of `call` and its output: a replay repeats the device's work without the host's."""
    torch.cuda.empty_cache()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def relative_difference(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference||; ValueError where a value is not finite."""
    difference = (out.double() - reference.double()).norm() / reference.double().norm()
    if not torch.isfinite(difference):
        raise ValueError("the outputs that are timed are not finite: nothing is measured by timing them")
    return float(difference)


class Journal:
    """What was measured so far, on disk after each part; what failed is named with its reason and loses nothing else."""

    def __init__(self, output: Path, head: dict[str, Any], ratios: Callable[[dict[str, Any]], dict[str, Any]], limit_s: float):
        self.output, self.ratios = output, ratios
        self.start, self.limit_s = time.monotonic(), limit_s
        self.data: dict[str, Any] = {**head, "ratios": {}, "parts": {}, "not_measured": {}}
        self.n_broken = 0

    def attempt(self, part: str, name: str, call: Callable[[], Any]) -> Any:
        """Run one part and keep what it returns as parts[part][name]; None where it could not be measured."""
        label = f"{part}/{name}"
        if time.monotonic() - self.start > self.limit_s:
            return self.skip(label, f"not begun: the run's {self.limit_s:.0f} s were over (--limit-s)")
        print(f"[{time.monotonic() - self.start:6.1f} s] {label}", file=sys.stderr, flush=True)
        try:
            result = call()
        except torch.OutOfMemoryError as error:
            return self.skip(label, f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # whatever it is, it is reported, and the run ends with exit code 1
            traceback.print_exc()
            self.n_broken += 1
            return self.skip(label, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.data["parts"].setdefault(part, {})[name] = result
        self.write()
        return result

    def skip(self, label: str, why: str) -> None:
        """Say that something was not measured, and why."""
        self.data["not_measured"][label] = why
        self.write()

    def write(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self.start, 1)
        self.data["ratios"] = self.ratios(self.data["parts"])
        self.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(rounded(self.data), indent=1) + "\n")
        partial.replace(self.output)


def rounded(value: Any) -> Any:
    """Floats with five significant digits: what is beyond is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value
