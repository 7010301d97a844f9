"""Rebuild the blocks of docs/performance.md between markers from study/results/real_size/*.json; --check only compares.

    python -m study.performance [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from htc_vlm.ops.cost import LLAMA_7B, cache_bytes, fast_compress_flops, prefill_flops
from study.generated import ROOT, check_or_write, with_blocks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from real_size.floors import Ceilings, Work

RESULTS = ROOT / "study" / "results" / "real_size"
PAGE = ROOT / "docs" / "performance.md"
TARGETS = {  # ratio: (what it says, target on one H100)
    "compress_share_of_matmul_ceiling_b8": ("compress, batch 8: share of the measured matmul rate", "at least 0.60"),
    "compress_vs_dense_masked_prefill_b8": ("compress, batch 8: time over that of the dense masked prefill", "at most 0.85"),
    "first_token_vs_text_only_b1": ("first token from the cache: time over that of text only, batch 1", "at most 1.05"),
    "uncompressed_vs_first_token_b1": ("first token uncompressed: time over that from the cache, batch 1", "at least 12"),
    "cache_bytes_vs_uncompressed": ("bytes kept of an image, over uncompressed", "0.00174 (1/576)"),
}
ASSUMED = Ceilings(matmul_tflops=750.0, copy_gb_per_s=3000.0)  # of an H100, until one is measured
N_QUESTION, N_VISUAL = 40, 580


def results() -> dict[str, dict[str, Any]]:
    """File stem -> result; the CPU last."""
    files = sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem == "cpu", path.stem))
    return {path.stem: json.loads(path.read_text()) for path in files}


def number(value: float | None) -> str:
    """
    >>> number(0.0017361), number(1234.5), number(15.81), number(None)
    ('0.00174', '1,234', '15.8', 'not measured')
    """
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are set right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def entry_table(title: str, entries: dict[str, dict[str, Any]], extra: dict[str, str] | None = None) -> str:
    """Measured calls with their floors; `extra` adds columns: heading -> key."""
    extra = extra or {}
    rows = []
    for name, one in entries.items():
        cells = [number(one["ms"]), number(one["floor_ms"]), f"{one['times_floor']:.2f}", one["floor_by"]]
        rows.append([name, *cells, *(number(one.get(key)) if key in one else "" for key in extra.values())])
    return table([title, "ms", "floor, ms", "times the floor", "floor by", *extra], rows)


def measured(part: dict[str, Any], case: str) -> dict[str, dict[str, Any]]:
    """The entries of one case, labelled."""
    return {f"{case}, {label(name)}": one for name, one in part[case].items() if isinstance(one, dict) and "ms" in one}


def label(name: str) -> str:
    return name.removesuffix("_graph").replace("_", " ") + (" (CUDA graph)" if name.endswith("_graph") else "")


# ------------------------------------------------------------------------------------------------ blocks
def ratios() -> str:
    """The checked ratios, devices side by side."""
    found = results()
    gpus = [name for name, one in found.items() if one["device_details"]["kind"] == "cuda"]
    columns = list(found) if gpus else ["one H100", *found]
    rows = []
    for key, (text, target) in TARGETS.items():
        cells = [number(found[name]["ratios"][key]) if name in found else "not yet run" for name in columns]
        rows.append([text, target, *cells])
    return table(["", "target (H100)", *columns], rows)


def by_batch() -> str:
    """The other ratios, with what arithmetic alone would give."""
    found = results()
    keys = sorted({key for one in found.values() for key in one["ratios"] if key not in TARGETS}, key=batch_last)
    if not keys:
        return "Nothing has been measured yet."
    rows = [[key.replace("_", " "), *(number(one["ratios"].get(key)) for one in found.values())] for key in keys]
    return table(["", *found], rows)


def batch_last(key: str) -> tuple[str, int, str]:
    """
    >>> batch_last("compress_vs_causal_prefill_b32"), batch_last("a_b1_by_flops")
    (('compress_vs_causal_prefill', 32, ''), ('a', 1, '_by_flops'))
    """
    match = re.fullmatch(r"(.*)_b(\d+)(.*)", key)
    return (match[1], int(match[2]), match[3]) if match else (key, 0, "")


def expected() -> str:
    """What arithmetic and memory allow at 7B: computed from ops/cost.py, nothing measured."""
    none, n_layers = [0] * LLAMA_7B.n_layers, LLAMA_7B.n_layers
    per_layer = 4 * LLAMA_7B.width**2 + 3 * LLAMA_7B.width * LLAMA_7B.mlp_width
    weights = 2 * (n_layers * per_layer + LLAMA_7B.width * LLAMA_7B.n_vocabulary)  # bfloat16
    rows = []
    for batch in (1, 8, 64):
        few = batch * prefill_flops(LLAMA_7B, none, N_QUESTION, n_logits=1, n_past=1)
        many = batch * prefill_flops(LLAMA_7B, [576] * n_layers, N_QUESTION, n_logits=1)
        (cached, bound), (whole, _) = (ASSUMED.floor_ms(Work(flops, weights)) for flops in (few, many))
        rows.append([str(batch), number(cached), bound, number(whole), number(whole / cached), number(many / few)])
    head = ["batch", "from the cache, ms", "bound by", "uncompressed, ms", "ratio", "ratio by FLOPs"]
    per_row = [cache_bytes(LLAMA_7B, [n + N_QUESTION] * n_layers) / 2**20 for n in (1, 576)]
    dense, least = prefill_flops(LLAMA_7B, [N_VISUAL + 1] * n_layers, n_text=0), fast_compress_flops(LLAMA_7B, N_VISUAL)
    notes = (
        f"Weights read once: {weights / 1e9:.1f} GB. Assumed until a card is measured: {ASSUMED.matmul_tflops:.0f} TFLOP/s in "
        f"bfloat16, {ASSUMED.copy_gb_per_s / 1000:.1f} TB/s.",
        f"A prompt of {N_QUESTION} tokens with its image holds {per_row[0]:.1f} MiB of cache with one token an image, "
        f"{per_row[1]:.1f} MiB with 576.",
        f"Compressing an image takes {least / 1e12:.2f} TFLOPs at least, the dense masked pass {dense / 1e12:.2f}: "
        f"{least / dense:.2f} by FLOPs.",
    )
    return table(head, rows) + "\n\n" + "\n".join(notes)


def devices() -> str:
    """One section for each result file."""
    found = results()
    return "\n\n".join(section(name, one) for name, one in found.items()) if found else "Nothing has been measured yet."


def section(name: str, one: dict[str, Any]) -> str:
    """Everything that one file holds."""
    parts, shapes, details = one["parts"], one["shapes"], one["device_details"]
    ceilings = parts["ceilings"]
    decoder = shapes["decoder"]
    size = (
        f"{decoder['n_layers']} layers of width {decoder['width']}, {shapes['n_patches']} patches, "
        f"{shapes['n_visual']} visual tokens, {shapes['n_bottleneck']} bottleneck token, {shapes['dtype']}, random weights"
    )
    where = f"{details['memory_gib']:.0f} GiB" if details["kind"] == "cuda" else f"{details['threads']} thread(s)"
    dirty = ", with uncommitted changes" if one["dirty"] else ""
    lines = [
        f"### `{name}`",
        f"{one['device']} ({where}), shape `{shapes['name']}`: {size}. torch {one['versions']['torch']}, transformers "
        f"{one['versions']['transformers']}; commit {str(one['commit'])[:12]}{dirty}; {one['seconds']:.0f} s.",
        "Ceilings: "
        + "; ".join(
            f"{when}: {number(c['matmul_tflops'])} TFLOP/s, {number(c['copy_gb_per_s'])} GB/s" for when, c in ceilings.items()
        )
        + ". Floors are made of the first.",
    ]
    lines += [block for block in (make(parts) for make in TABLES) if block]
    if one["not_measured"]:
        lines.append("Not measured:\n" + "\n".join(f"* {what}: {why}" for what, why in one["not_measured"].items()))
    return "\n\n".join(lines)


def compress_table(parts: dict[str, Any]) -> str:
    part = parts.get("compress", {})
    entries = {key: one for case in part if case.startswith("b") for key, one in measured(part, case).items()}
    entries |= {label(case): one for case, one in part.items() if case.startswith("compiled")}
    columns = {"images/s": "images_per_s", "share of matmul ceiling": "share_of_matmul_ceiling"}
    checked = [f"{case}: {number(one['fast_vs_general_difference'])}" for case, one in part.items() if case.startswith("b")]
    note = f"\n\nCells of the fast path against those of the masked pass, relative difference: {', '.join(checked)}."
    return entry_table("compress (visual tokens to cells)", entries, columns) + note if entries else ""


def shares_table(parts: dict[str, Any]) -> str:
    part = parts.get("compress", {})
    entries = {key: one for case in part if case.startswith("shares") for key, one in measured(part, case).items()}
    return entry_table("from pixels to cells", entries, {"share of the whole": "share_of_whole"}) if entries else ""


def first_token_table(parts: dict[str, Any]) -> str:
    part = parts.get("first_token", {})
    entries = {key: one for case in part for key, one in measured(part, case).items()}
    return entry_table("first token, 40-token question", entries) if entries else ""


def generate_table(parts: dict[str, Any]) -> str:
    part = parts.get("generate", {})
    entries = {key: one for case in part for key, one in measured(part, case).items()}
    title = "the same, and whole answers, through `generate`"
    return entry_table(title, entries, {"tokens/s": "tokens_per_s"}) if entries else ""


def decode_table(parts: dict[str, Any]) -> str:
    part = parts.get("decode", {})
    entries = {key: one for case in part if case.startswith("b") for key, one in measured(part, case).items()}
    tried = {f"{case.replace('_', ' ')}: {one['rows']:,} rows": one["speed"] for case, one in part.items() if "speed" in one}
    columns = {"tokens/s": "tokens_per_s", "ms a step": "step_ms"}
    text = entry_table("decode", entries | tried, columns) if entries or tried else ""
    computed = part.get("largest_batch_by_bytes")
    if computed:
        rows = ", ".join(f"{count:,} with {name.replace('_', ' ')}" for name, count in computed["rows"].items())
        text += f"\n\nRows whose cache fits beside the weights in {computed['memory_gib']} GiB, computed: {rows} an image "
        text += f"({number(computed['ratio'])} times as many)."
    return text


def cache_line(parts: dict[str, Any]) -> str:
    kept = parts.get("cache", {}).get("bytes")
    return "" if not kept else f"An image is kept in {kept['compressed']:,} bytes instead of {kept['uncompressed']:,}."


def train_table(parts: dict[str, Any]) -> str:
    part = parts.get("train", {})
    entries = {f"LoRA step, {name}": one for name, one in part.items() if "ms" in one}
    if not entries:
        return ""
    about = part["setting"]
    peaks = [f"{name} {one['peak_bytes'] / 2**30:.1f} GiB" for name, one in part.items() if one.get("peak_bytes")]
    note = f"\n\n{about['images']} images, {about['tokens']:,} tokens, rank {about['lora_rank']}, "
    note += f"{about['trainable_parameters']:,} trainable parameters, "
    note += "with" if about["gradient_checkpointing"] else "without"
    note += " gradient checkpointing" + (f"; peak memory: {', '.join(peaks)}." if peaks else ".")
    return entry_table("train", entries, {"tokens/s": "tokens_per_s"}) + note


TABLES = (compress_table, shares_table, first_token_table, generate_table, decode_table, cache_line, train_table)
BLOCKS = {"ratios": ratios, "by-batch": by_batch, "expected": expected, "devices": devices}


def files() -> dict[Path, str]:
    """docs/performance.md, its tables made anew."""
    return with_blocks(PAGE, BLOCKS)


if __name__ == "__main__":
    raise SystemExit(check_or_write(files, __doc__))
