"""Values for what no checkpoint holds: buffers of compressors, and weights of an untrained quantizer.

Source:  transformers 5.23, `from_pretrained`: models are built on the meta device, so what a constructor wrote is lost; missing
         weights and all non-persistent buffers are then `torch.empty`, and `_init_weights` knows transformers' modules only.
Differs: nothing stays as it lay in memory: the compressor is built once more, on the CPU, and its values are copied.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from htc_vlm import compressors
from htc_vlm.compressors import Compressor, Sizes

SEED = 0


@torch.no_grad()
def fill(model: nn.Module, missing: Collection[str], sizes: Sizes) -> None:
    """Give the model's compressor what `missing` (names of weights and buffers not in the checkpoint) and the buffers that are
    never saved should hold: what its constructor writes, the same at every call. Weights of transformers' kinds and those of
    `Compressor.init_own_weights` are left as they are: they were initialised."""
    for prefix, compressor in model.named_modules():
        if not isinstance(compressor, Compressor):
            continue
        buffers = dict(compressor.named_buffers())
        saved = set(compressor.state_dict(keep_vars=True))
        open_buffers = {name for name in buffers if name not in saved or f"{prefix}.{name}" in missing}
        open_weights = {
            name
            for name, _ in compressor.named_parameters()
            if name.startswith("quantizer.") and f"{prefix}.{name}" in missing
        }
        if not open_buffers | open_weights:
            continue
        fresh = _built(compressor, sizes, with_weights=bool(open_weights or open_buffers & saved))
        values = {**dict(fresh.named_buffers()), **dict(fresh.named_parameters())}
        targets: dict[str, Any] = {**buffers, **dict(compressor.named_parameters())}
        for name in sorted(open_buffers | open_weights):
            if targets[name].device.type != "meta":
                targets[name].copy_(values[name])


def _built(compressor: Compressor, sizes: Sizes, with_weights: bool) -> Compressor:
    """The compressor as its constructor makes it, without layers of the language model's kind."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), nullcontext() if with_weights else no_init_weights():
        torch.manual_seed(SEED)
        fresh = compressors.build(**compressor.to_dict())
        fresh.setup(replace(sizes, new_decoder_layer=lambda index: nn.Identity()))
    return fresh
