"""The quantizer that a study's rows read codes from: a folder of its own, or what a checkpoint carries.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from htc_vlm import compressors
from htc_vlm.model.loading import find

QUANTIZER = "model.compressor.quantizer."


def quantizer_of(name: str, work: Path) -> Path:
    """A folder with the quantizer's weights: `name` itself, or those that a checkpoint carries, taken out into `work`."""
    path = Path(name)
    if path.is_file() or (path.is_dir() and not _carried(path)):
        return path
    folder = find(name)
    keys = _carried(folder)
    if not keys:
        raise ValueError(f"mgvq: the checkpoint {name} carries no quantizer; give an MGVQ folder or file")
    tensors = {}
    for file, key in keys:
        with safe_open(file, framework="pt") as opened:
            tensors[key.removeprefix(QUANTIZER)] = opened.get_tensor(key).contiguous()
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.float().numpy().tobytes())
    out = work / f"quantizer-{digest.hexdigest()[:12]}" / "model.safetensors"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial_file = out.with_name(f"{os.getpid()}.partial")
        save_file(tensors, partial_file)
        partial_file.replace(out)
    return out.parent


def _carried(folder: Path) -> list[tuple[Path, str]]:
    """(file, name) of the quantizer's weights inside a checkpoint."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found += [(file, key) for key in opened.keys() if key.startswith(QUANTIZER)]  # noqa: SIM118
    return found


def needs_quantizer(compressor: Mapping[str, Any]) -> bool:
    """Does this method read a code?"""
    return bool(getattr(compressors.build(**compressor), "has_code", False))
