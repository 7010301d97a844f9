"""benchmarks/methods.py on a very small shape."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .. import tinies

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_methods", REPO / "benchmarks" / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(methods: ModuleType) -> dict[str, Any]:
    """Every method, once, on 16 patches and 8 layers."""
    config = tinies.config()
    config.text_config.num_hidden_layers = 8
    config.text_config.layer_types = ["full_attention"] * 8
    config.vision_config.num_hidden_layers = 4
    own = {
        "qformer": {"width": 16, "n_layers": 2, "n_heads": 2},
        "htc": {"quantizer": tinies.TINY_CODE},
        "readers": {"n_readers": 2},  # as many as the tiny shape has key-value heads
    }
    shape = methods.Shape(config, torch.float32, own, instead={"sparse_vlm": {"layers": (0, 2), "keep": (6, 2), "n_heads": 2}})
    return methods.measure(shape, torch.device("cpu"), [4], n_text=5, n_new=2, repeats=1)


def test_every_method_that_has_a_budget_is_in_the_run(methods: ModuleType, result: dict[str, Any]) -> None:
    """A method added later would be missing from the comparison without anybody noticing."""
    from htc_vlm import compressors

    assert {name for name, _ in methods.methods()} | {"none"} == set(compressors.names())
    assert len(result["rows"]) == 1 + len(methods.methods())


def test_ratios_are_to_none_of_the_same_run(result: dict[str, Any]) -> None:
    """FLOPs by hand for random_drop: (4 + 5) of (16 + 5) tokens, and what grows with their square."""
    rows = {(row["method"], row["settings"].get("place"), row["settings"].get("n_fusion")): row for row in result["rows"]}
    assert [rows["none", None, None][f"{name}_ratio"] for name in ("prefill", "decode", "promised", "counted")] == [1, 1, 1, 1]
    linear = 2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48)  # of one token in one layer: query, output, key, value, MLP

    def by_hand(n: int) -> int:
        return 8 * (n * linear + 4 * n * n * 32) + 2 * 32 * 40

    drop = rows["random_drop", None, None]
    assert drop["promised_ratio"] == pytest.approx(by_hand(9) / by_hand(21), abs=1e-4)
    assert rows["voco", None, None]["promised_ratio"] > 1 > rows["fastv", None, None]["promised_ratio"]
    fused, ablation = (rows["llava_mini", None, n] for n in (None, 0))
    assert fused["promised_ratio"] > ablation["promised_ratio"]
    assert rows["htc", None, None]["again_ms"] > 0 and drop["again_ms"] is None


def test_counted_flops_are_those_promised_and_what_is_not_promised(result: dict[str, Any]) -> None:
    """Tower, projector, compressor and scores come on top; a method that saves nothing would show here."""
    extra = {row["method"]: row["counted_flops"] - row["promised_flops"] for row in result["rows"]}
    assert all(value > 0 for value in extra.values())
    assert extra["random_drop"] < extra["none"]  # fewer patches are projected
    assert extra["fastv"] < 1.2 * extra["none"]


def test_the_7b_shape_is_llavas_and_needs_a_gpu(methods: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it would run for hours before anybody noticed."""
    shape = methods.shape_7b()
    assert (shape.config.text_config.num_hidden_layers, shape.config.text_config.hidden_size) == (32, 4096)
    monkeypatch.setattr(sys, "argv", ["methods.py", "--shape", "7b"])
    with pytest.raises(ValueError, match="needs a GPU"):
        methods.main()


@pytest.mark.gpu
def test_the_7b_shape_runs_on_a_gpu(methods: ModuleType) -> None:
    """One budget, one repeat: every method at true size."""
    result = methods.measure(methods.shape_7b(), torch.device("cuda"), [64], n_text=40, n_new=2, repeats=1)
    assert all(row["prefill_ms"] > 0 for row in result["rows"])


def test_the_examples_in_the_script_hold(methods: ModuleType) -> None:
    """benchmarks/ is not among the folders whose doctests pytest collects."""
    found = doctest.testmod(methods)
    assert found.attempted and not found.failed
