"""Speed, memory and their floors at real size: compress, ask, decode, keep, train; random weights, one JSON.

    python benchmarks/real_size.py --shape 7b               LLaVA-1.5-7B with HTC, one GPU with 80 GB, about 6 minutes
    python benchmarks/real_size.py --shape small            a small decoder with LLaVA's 576 patches, on two CPU cores

(a) ceilings of the device: a large matrix product, a large copy; (b) compress; (c) the first token; (d) decode; (e) bytes of an
image; (f) a LoRA step. Medians after warm-up, device events on CUDA; every time stands beside its floor: FLOPs counted over the
measured matmul rate, or bytes over the measured copy rate, whichever is longer. Written after each part; what could not be
measured is named in `not_measured`, and the rest goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from htc_vlm.eval.run_info import provenance

sys.path.insert(0, str(Path(__file__).resolve().parent))

from real_size import asking, compressing, learning, shapes
from real_size.bench import Bench
from real_size.clock import Journal, measure_ceilings
from real_size.floors import Ceilings

PARTS = {"compress": compressing.measure, "ask": asking.measure, "train": learning.measure}


def ratios(parts: dict[str, Any]) -> dict[str, float | None]:
    """The numbers that claims are made of; None where a part of one was not measured.

    Both sides of a ratio were run the same way: first tokens as CUDA graphs where there are any, compress call by call.
    `..._by_flops` is the same ratio if arithmetic were all; `..._of_floors` the same ratio of the floors.
    """
    compress, first, cache = parts.get("compress", {}), parts.get("first_token", {}), parts.get("cache", {})
    out: dict[str, float | None] = {
        "compress_share_of_matmul_ceiling_b8": None, "compress_vs_dense_masked_prefill_b8": None,
        "first_token_vs_text_only_b1": None, "uncompressed_vs_first_token_b1": None, "cache_bytes_vs_uncompressed": None,
    }  # fmt: skip
    for name, one in compress.items():
        if name.startswith("b"):
            fast, masked = one["fast"], one["dense_masked"]
            out[f"compress_share_of_matmul_ceiling_{name}"] = fast["share_of_matmul_ceiling"]
            out[f"compress_vs_dense_masked_prefill_{name}"] = fast["ms"] / masked["ms"]
            out[f"compress_vs_dense_masked_prefill_{name}_by_flops"] = fast["flops"] / masked["flops"]
            out[f"compress_vs_causal_prefill_{name}"] = fast["ms"] / one["causal_patches"]["ms"]
    for name, one in first.items():
        sides = ("from_cache", "text_only", "uncompressed")
        graph = "_graph" if all(f"{side}_graph" in one for side in sides) else ""
        cached, text, whole = (one[f"{side}{graph}"] for side in sides)
        out[f"first_token_vs_text_only_{name}"] = cached["ms"] / text["ms"]
        out[f"uncompressed_vs_first_token_{name}"] = whole["ms"] / cached["ms"]
        out[f"uncompressed_vs_first_token_{name}_by_flops"] = whole["flops"] / cached["flops"]
        out[f"uncompressed_vs_first_token_{name}_of_floors"] = whole["floor_ms"] / cached["floor_ms"]
    if "bytes" in cache:
        out["cache_bytes_vs_uncompressed"] = cache["bytes"]["ratio"]
    return out


def device_head(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        details: dict[str, Any] = {"memory_gib": about.total_memory / 2**30, "cuda": torch.version.cuda}
        return {"device": about.name, "device_details": {"kind": "cuda", **details}}
    details = {"threads": torch.get_num_threads(), "load_average": list(os.getloadavg())}
    return {"device": "cpu", "device_details": {"kind": "cpu", **details}}


def default_output(device: str, shape: str) -> Path:
    """
    >>> default_output("NVIDIA H100 80GB HBM3", "7b").as_posix(), default_output("cpu", "tiny").as_posix()
    ('study/results/real_size/nvidia-h100-80gb-hbm3.json', 'runs/real_size/cpu-tiny.json')
    """
    name = device.lower().replace(" ", "-")
    if shape == "tiny":
        return Path(f"runs/real_size/{name}-tiny.json")
    return Path(f"study/results/real_size/{name}{'-7b' if (name, shape) == ('cpu', '7b') else ''}.json")


def origin(commit: str | None) -> dict[str, Any]:
    """provenance(); where there is no git (a copied working tree), what --commit says: SHA, or SHA-dirty."""
    found = provenance()
    if found["commit"] is None and commit is not None:
        found |= {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
    return found


def table(data: dict[str, Any]) -> str:
    """Every entry on a line: milliseconds, floor, times the floor."""
    lines = [f"{'':<46} {'ms':>10} {'floor':>10} {'x floor':>8}  bound by"]
    for part, cases in data["parts"].items():
        for case, entries in cases.items():
            for name, one in (entries if isinstance(entries, dict) else {}).items():
                if isinstance(one, dict) and "times_floor" in one:
                    label = f"{part} {case} {name}"
                    lines.append(
                        f"{label:<46} {one['ms']:>10.3f} {one['floor_ms']:>10.3f} {one['times_floor']:>8.2f}  {one['floor_by']}"
                    )
    lines += [f"{name:<60} {'-' if value is None else format(value, '.5g')}" for name, value in data["ratios"].items()]
    lines += [f"not measured: {name}: {why}" for name, why in data["not_measured"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="default: study/results/real_size/DEVICE.json")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--compile", action="store_true", help="also the fast path under torch.compile (minutes to compile)")
    parser.add_argument("--limit-s", type=float, default=480.0, help="no part is begun after so many seconds")
    parser.add_argument("--commit", help="for a copy without git: the commit it was copied from (SHA or SHA-dirty)")
    options = parser.parse_args()
    shape, device = shapes.SHAPES[options.shape], torch.device(options.device)
    head = device_head(device)
    output = options.output or default_output(head["device"], shape.name)
    journal = Journal(output, {**head, **origin(options.commit)}, ratios, options.limit_s)

    found: list[Ceilings] = []

    def ceilings() -> dict[str, float]:
        found.append(measure_ceilings(device, shapes.dtype_of(shape), shape.matmul_side, shape.copy_mib))
        return asdict(found[-1])

    if journal.attempt("ceilings", "first", ceilings) is None:
        return 1
    model = journal_model(journal, shape, device)
    if model is None:
        return 1
    bench = Bench(model, shape, device, found[0])
    for name in options.parts:
        if name == "train" and options.compile:
            batch = 8 if 8 in shape.compress_batches else shape.compress_batches[-1]
            journal.attempt("compress", f"compiled_b{batch}", partial(compressing.compiled, bench, batch))
        PARTS[name](bench, journal)
    journal.attempt("ceilings", "last", ceilings)  # a card that has grown hot is slower
    print(table(journal.data))
    print(f"written to {output}")
    return 1 if journal.n_broken else 0


def journal_model(journal: Journal, shape: shapes.Shape, device: torch.device) -> Any:
    """Build the model and write its shapes down."""
    built: list[Any] = []

    def build() -> dict[str, Any]:
        built.append(shapes.build(shape, device))
        return {"weights_bytes": sum(weight.nbytes for weight in built[0].parameters())}

    if journal.attempt("model", "built", build) is None:
        return None
    journal.data["shapes"] = shapes.describe(shape, built[0])
    return built[0]


if __name__ == "__main__":
    raise SystemExit(main())
