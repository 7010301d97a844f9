"""Says which of the shipped checkpoints know drawn scenes only."""

from __future__ import annotations

import sys
from pathlib import Path

TOYS = ("tiny", "tiny-htc", "tiny-upper")


def tell_toy(command: str, model: str) -> None:
    """One line on stderr where `model` is a shipped toy, by its name: a folder of that name is somebody's own."""
    if model in TOYS and not (Path(model) / "config.json").is_file():
        told = f"{model} knows drawn scenes only (htc-vlm data pictograms); what it says of other pictures means nothing"
        print(f"htc-vlm {command}: {told}", file=sys.stderr)
