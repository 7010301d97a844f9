"""SHA-256 of a model's weights as they act: its active adapters included, whatever dtype they were loaded in.

Source:  nothing published; peft's BaseTunerLayer for what an adapter adds to a layer.
Differs: values enter rounded to bfloat16, 1,024 of each tensor one by one and all of them as sums over 4,096 neighbours, so
         that 7 billion weights take seconds. float16 cannot hold all that a bfloat16 or float32 checkpoint says: there
         the values are looked up in the checkpoint, as long as the weights in memory are still its weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

N_SAMPLED = 1024  # values of each tensor that enter the digest one by one
N_SUMMED = 4096  # neighbours whose sum enters it
CHUNK = 1 << 22  # values that are summed at a time: bounds the memory that the digest takes
CONSTANTS = ("eps", "variance_epsilon")  # numbers of modules that are no tensors and no configuration once it is built
ADAPTER = "image_reader"  # what our own adapter is called in memory and in its file (adapter.py)
RENAMED = frozenset({"model", "vision_model", "language_model"})  # parts of names that differ between file and memory


def weights_digest(model: nn.Module, inside: nn.Module | None = None, without: tuple[str, int] | None = None) -> str:
    """64 hex digits of all weights and persistent buffers, of norms' constants and of what active adapters add.

    Equal for float32, bfloat16 and float16 loads of one checkpoint, for any device, and for a model whose adapters are
    disabled and the model without them. ValueError for weights that are not here: sharded over processes (each process
    would see, and cache, its own share of the heads) or on the meta device.

    inside: what was loaded from a checkpoint, where `model` is a part of it. without: (name, row) that does not enter.
    """
    made = hashlib.sha256()
    in_file = _InFile(model if inside is None else inside, model)
    for name, value in sorted(_acting_tensors(model).items()):
        check_is_here(value, name)
        value = value.detach()
        if value.dtype == torch.float16:
            value = in_file.before_rounding(name, value)
        if without is not None and name == without[0]:
            value = value.index_fill(0, torch.tensor(without[1], device=value.device), 0)
        made.update(f"{name} {tuple(value.shape)}".encode())
        for part in _summary(value):
            made.update(part.cpu().numpy().tobytes())
    made.update(json.dumps(_acting_settings(model), sort_keys=True).encode())
    return made.hexdigest()


def _summary(value: Tensor) -> Iterator[Tensor]:
    """A sample of the values' bits, and sums of all of them."""
    flat = value.reshape(-1)
    bits = flat.to(torch.bfloat16).view(torch.int16) if flat.is_floating_point() else flat
    yield bits[:: max(1, bits.numel() // N_SAMPLED)][:N_SAMPLED]
    for chunk in bits.split(CHUNK):
        whole = chunk[: chunk.numel() // N_SUMMED * N_SUMMED]
        yield whole.view(-1, N_SUMMED).sum(1, dtype=torch.int64)
        yield chunk[whole.numel() :].sum(dtype=torch.int64)


def check_is_here(value: Tensor, name: str = "its embedding of words") -> None:
    """ValueError for a weight that is sharded or offloaded: what is compressed with it could not be told apart."""
    if hasattr(value, "full_tensor"):  # a DTensor
        raise ValueError(
            f"{name} is sharded over processes (tensor parallelism or FSDP), where images cannot be compressed or "
            "asked from their kv; load the model whole on each device, and give each its own images"
        )
    if value.device.type == "meta":
        raise ValueError(
            f"{name} is offloaded (on the meta device), so what made the compressed images cannot be told; "
            "load the model whole on a device"
        )


# ------------------------------------------------------------------------------------------------------------- adapters
def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of the layers that peft has put adapters into; none without asking where peft was never imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    return [(name, part) for name, part in model.named_modules() if isinstance(part, tuners.BaseTunerLayer)]


def _wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, wrapper) of the modules that peft trains beside the adapters (`modules_to_save`)."""
    other = sys.modules.get("peft.utils.other")
    if other is None:
        return []
    kind = getattr(other, "AuxiliaryTrainingWrapper", None) or other.ModulesToSaveWrapper
    return [(name, part) for name, part in model.named_modules() if isinstance(part, kind)]


def _read_adapters(layer: Any) -> list[str]:
    """The adapters whose own weights this layer's forward reads: active, neither disabled nor merged into the base."""
    if layer.disable_adapters:
        return []
    return [adapter for adapter in layer.active_adapters if adapter not in layer.merged_adapters]


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    """What decides how a layer's adapters act, apart from their weights."""
    scaling = layer.scaling if isinstance(getattr(layer, "scaling", None), dict) else {}
    return bool(layer.disable_adapters), tuple(layer.active_adapters), tuple(layer.merged_adapters), tuple(scaling.items())


def _wrapper_state(wrapper: Any) -> tuple[Any, ...]:
    return bool(wrapper.disable_adapters), tuple(wrapper.active_adapters)


def _acting_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight or persistent buffer; weights under an adapter by the name they have without it."""
    adapted = _adapted(model)
    for _, layer in adapted:
        if layer.disable_adapters and layer.merged_adapters:
            layer.unmerge()  # as the layer's next forward would
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, part in model.named_modules():
        for name in _persistent(part):
            buffer = part._buffers[name]
            if buffer is not None:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    if not adapted:
        return tensors
    named = {name: _acting_name(name, adapted) for name in tensors}
    return {acting: tensors[name] for name, acting in named.items() if acting is not None}


def _acting_name(name: str, adapted: list[tuple[str, Any]]) -> str | None:
    """`q.base_layer.weight` -> `q.weight`, `q.lora_A.mine.weight` -> `q.lora_A.0.weight`; None for what is not read."""
    for prefix, layer in adapted:
        if not name.startswith(f"{prefix}."):
            continue
        kind, _, rest = name[len(prefix) + 1 :].partition(".")
        if kind == "base_layer":
            return f"{prefix}.{rest}"
        if kind not in layer.adapter_layer_names:
            return name
        adapter, _, rest = rest.partition(".")
        read = _read_adapters(layer)
        return f"{prefix}.{kind}.{read.index(adapter)}.{rest}" if adapter in read else None
    return name


def _acting_settings(model: nn.Module) -> list[Any]:
    """Constants of norms, and scales of the adapters that are read."""
    settings: list[Any] = [
        (name.replace(".base_layer", ""), key, vars(part)[key])
        for name, part in model.named_modules()
        for key in CONSTANTS
        if isinstance(vars(part).get(key), float)
    ]
    for name, layer in _adapted(model):
        scaling = getattr(layer, "scaling", None)
        read = [adapter for adapter in _read_adapters(layer) if isinstance(scaling, dict) and adapter in scaling]
        if read:
            settings.append((name, [float(layer.scaling[adapter]) for adapter in read]))
    return settings + [(name, _wrapper_state(wrapper)) for name, wrapper in _wrapped(model)]


def _persistent(part: nn.Module) -> list[str]:
    return [name for name in part._buffers if name not in part._non_persistent_buffers_set]


# --------------------------------------------------------------------------------------------------- float16 and its file
class _InFile:
    """The values of float16 weights before they were rounded, from the checkpoint that the model was loaded from, and the
    file of its adapter."""

    def __init__(self, model: nn.Module, part: nn.Module) -> None:
        self._model = model
        prefix = next((name for name, one in model.named_modules() if one is part), "")
        self._prefix = f"{prefix}." if prefix else ""
        self._found: dict[str, tuple[Path, str]] | None = None

    def before_rounding(self, name: str, value: Tensor) -> Tensor:
        """The file's numbers where rounding them gives those of `value`; elsewhere `value`'s, no longer the file's. A table
        may have grown since (the bottleneck token's row)."""
        if self._found is None:
            folder = _folder_of(self._model)
            self._found = _tensors_in_files(sorted(folder.glob("*.safetensors")) if folder else [])
            adapter = getattr(self._model, "adapter_file", None)
            self._found |= _tensors_in_files([adapter] if adapter else [])
        here = self._found.get(_plain(self._prefix + name))
        if here is None:
            return value
        with safe_open(here[0], framework="pt") as file:
            if file.get_slice(here[1]).get_dtype() not in ("F32", "BF16"):
                return value  # float16 in the file too: nothing was rounded
            exact = file.get_tensor(here[1])
        at: Any = ...
        if exact.shape != value.shape:
            if exact.ndim != value.ndim or exact.shape[1:] != value.shape[1:] or len(exact) > len(value):
                return value
            at = slice(len(exact))
        full = value.cpu().to(exact.dtype)
        full[at] = torch.where(exact.to(torch.float16) == value.cpu()[at], exact, full[at])
        return full


def _folder_of(model: nn.Module) -> Path | None:
    """The folder of a model's checkpoint: as given to from_pretrained, or that of the hub's cache."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no repository's name: the folder has gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _tensors_in_files(paths: Sequence[Path]) -> dict[str, tuple[Path, str]]:
    """Plain name -> (file, its name there)."""
    found: dict[str, tuple[Path, str]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {_plain(key): (path, key) for key in file.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError):
            continue
    return found


def _plain(name: str) -> str:
    """A name without the parts that checkpoints and memory disagree about.

    >>> _plain("language_model.model.layers.0.mlp.up_proj.weight") == _plain("model.language_model.layers.0.mlp.up_proj.weight")
    True
    """
    return ".".join(part for part in name.replace(f".{ADAPTER}.", ".0.").split(".") if part not in RENAMED)


# ---------------------------------------------------------------------------------------------------------------- watch
class Watch:
    """Notices whether anything that enters `weights_digest` was replaced, moved, written or switched since.

    Writing through `parameter.data` in place is invisible to torch's version counters, and so to the watch.

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
        self._tensors = [
            (part._parameters, len(part._parameters), [(name, _state(p)) for name, p in part._parameters.items()])
            for part in modules
            if part._parameters
        ] + [
            (part._buffers, len(part._buffers), [(name, _state(part._buffers[name])) for name in _persistent(part)])
            for part in modules
            if part._buffers
        ]
        self._bare = [part._buffers for part in modules if not part._buffers]
        self._constants = [
            (vars(part), key, vars(part)[key]) for part in modules for key in CONSTANTS if key in vars(part)
        ]
        self._adapters = [(layer, _adapter_state(layer)) for _, layer in _adapted(model)]
        self._wrappers = [(wrapper, _wrapper_state(wrapper)) for _, wrapper in _wrapped(model)]

    def holds(self) -> bool:
        """A tenth of the time that walking `named_parameters` takes: this runs before each answer."""
        return (
            all(_ids(children) == ids for children, ids in self._children)
            and all(_unchanged(*kept) for kept in self._tensors)
            and not any(self._bare)
            and all(of.get(key) == value for of, key, value in self._constants)
            and all(_adapter_state(layer) == state for layer, state in self._adapters)
            and all(_wrapper_state(wrapper) == state for wrapper, state in self._wrappers)
        )


_State = tuple[weakref.ref[Tensor], int, int] | None


def _unchanged(now_of: Mapping[str, Tensor | None], n_names: int, kept: list[tuple[str, _State]]) -> bool:
    if len(now_of) != n_names:
        return False
    for name, state in kept:
        now = now_of.get(name)
        if state is None or now is None:  # a linear layer without bias has its place for one
            if state is not now:
                return False
        elif state[0]() is not now or now._version != state[1] or now.data_ptr() != state[2]:
            return False
    return True


def _ids(children: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, children.values()))


def _state(tensor: Tensor | None) -> _State:
    return None if tensor is None else (weakref.ref(tensor), tensor._version, tensor.data_ptr())
