"""Saving a trained model in bfloat16, gathered where its weights are sharded.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htc_vlm.files import replacing_folder


def save_rounded(model: Any, processor: Any, folder: Path) -> None:
    """Save in bfloat16: half the bytes; loaded as float32 it gives the same numbers everywhere. The quantizer keeps its
    precision: a rounded codebook would change codes. In a distributed run every process must call this: what is sharded is
    gathered, and the first process writes."""
    state = _whole_state(model)
    if state is not None:
        rounded = {
            name: value.to(torch.bfloat16) if value.is_floating_point() and ".quantizer." not in name else value
            for name, value in state.items()
        }
        with replacing_folder(folder) as partial_folder:
            _write_model(model, rounded, processor, partial_folder)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _write_model(model: Any, state: dict[str, Tensor], processor: Any, folder: Path) -> None:
    # With its sharding in the configuration, save_pretrained would gather again, alone, and wait for the others for ever.
    sharding = model.config.__dict__.pop("distributed_config", None)
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        if sharding is not None:
            model.config.distributed_config = sharding
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    config.pop("use_cache", None)  # Trainer's own setting, which would make generate slow
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("_name_or_path", None)  # where the weights once lay
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(folder)


def _whole_state(model: Any) -> dict[str, Tensor] | None:
    """Every weight and buffer in full, on the CPU where they were sharded; None in all processes but the first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        whole: dict[str, Tensor] = model.state_dict()
        return whole
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    gathered: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(gathered) if torch.distributed.get_rank() == 0 else None
