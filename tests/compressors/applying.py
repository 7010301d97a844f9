"""The methods that `htc_vlm.apply` is tested with, on a tiny LLaVA of 16 patches and 6 layers, and how they are asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import htc_vlm

N_NEW = 3  # of the prefill, over its cache, and over a cache that has grown
INSIDE = {
    "fastv": {"n_keep": 5, "layer": 2},
    "pyramid_drop": {"stages": (1, 3, 5), "ratio": 0.5},
    "sparse_vlm": {"layers": (1, 3), "keep": (7, 3)},
    "sparse_vlm+": {"layers": (1, 3), "keep": (7, 3), "plus": True, "n_heads": 2},
}
BEFORE = {
    "random_drop": {"n_keep": 5},
    "avg_pool": {"n_tokens": 4},
    "divprune": {"n_keep": 6},
    "downsample": {"n_tokens": 4},
    "tome": {"n_keep": 5},
    "tome+": {"n_keep": 5, "place": "after_tower"},
    "visionzip": {"n_dominant": 4, "n_contextual": 2},
}
ALL = {**INSIDE, **BEFORE}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
}
both = pytest.mark.parametrize("attention", ["sdpa", "eager"])
inside = pytest.mark.parametrize("case", INSIDE)
every = pytest.mark.parametrize("case", ALL)


def applied(model: Any, case: str) -> Any:
    return htc_vlm.apply(model, case.rstrip("+"), **ALL[case])


def answer(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=N_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def traces(model: Any) -> list[Any]:
    """Everything that a block could leave behind: classes, hooks, attributes, configuration."""
    found: list[Any] = [model.config.to_json_string()]
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        found.append((name, type(module), hooks, sorted(module.__dict__)))
    return found
