"""Which model made these kv: a short name of its weights and settings, and a cheap watch over whether it still holds.

Source:  nothing published; sha256 over sampled weights.
Differs: the digest is taken once, then only re-taken when the watch sees a replaced, moved or written parameter. Writing
         through `parameter.data` in place is invisible to torch's version counters, and so to the watch.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

N_SAMPLED = 1024  # values of each weight that enter the digest


def digest(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """16 hex digits of the weights (up to 1024 values of each, rounded to bfloat16) and of `settings`.

    Independent of device and of the dtype the weights were loaded in. ValueError for weights that are sharded over
    processes: a process would see, and cache, its own share of the heads only.
    """
    made = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        if hasattr(weights[name], "full_tensor"):  # a DTensor
            raise ValueError(
                f"{name} is sharded over processes (tensor parallelism or FSDP), where images cannot be compressed or "
                "asked from their kv; load the model whole on each device, and give each its own images"
            )
        flat = weights[name].detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // N_SAMPLED)][:N_SAMPLED].to(torch.bfloat16).cpu()
        made.update(f"{name} {tuple(weights[name].shape)}".encode())
        made.update(sample.view(torch.int16).numpy().tobytes())
    return made.hexdigest()[:16]


class Watch:
    """Notices whether any parameter of a model was replaced, moved or written since.

    >>> linear = nn.Linear(2, 2)
    >>> watch = Watch(linear)
    >>> watch.holds()
    True
    >>> with torch.no_grad():
    ...     _ = linear.weight.add_(1)
    >>> watch.holds()
    False
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [(part._modules, _ids(part._modules)) for part in modules if part._modules]
        self._weights = [
            (part._parameters, len(part._parameters), [(name, _state(p)) for name, p in part._parameters.items()])
            for part in modules
            if part._parameters
        ]

    def holds(self) -> bool:
        """A tenth of the time that walking `named_parameters` takes: this runs before each answer."""
        for children, ids in self._children:
            if _ids(children) != ids:
                return False
        for parameters, n_parameters, kept in self._weights:
            if len(parameters) != n_parameters:
                return False
            for name, state in kept:
                now = parameters.get(name)
                if state is None or now is None:  # a linear layer without bias has its place for one
                    if state is not now:
                        return False
                elif state[0]() is not now or now._version != state[1] or now.data_ptr() != state[2]:
                    return False
        return True


def _ids(children: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, children.values()))


def _state(parameter: nn.Parameter | None) -> tuple[weakref.ref[nn.Parameter], int, int] | None:
    return None if parameter is None else (weakref.ref(parameter), parameter._version, parameter.data_ptr())


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Watch, str, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """`digest`, taken again only when the weights or the settings changed."""
    written = json.dumps(settings, sort_keys=True)
    known = _KNOWN.get(model)
    if known is None or known[1] != written or not known[0].holds():
        known = (Watch(model), written, digest(model, settings))
        _KNOWN[model] = known
    return known[2]
