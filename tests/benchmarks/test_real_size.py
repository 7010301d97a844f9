"""benchmarks/real_size.py from end to end at a tiny shape: its keys, its FLOPs, and what it does when a part fails."""

from __future__ import annotations

import doctest
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from htc_vlm.eval import run_info
from htc_vlm.model import HtcVlmForConditionalGeneration
from htc_vlm.ops.cost import DecoderShape, count_flops, prefill_flops

REPO = Path(__file__).resolve().parents[2]
RATIOS = (
    "compress_share_of_matmul_ceiling_b8",
    "compress_vs_dense_masked_prefill_b8",
    "first_token_vs_text_only_b1",
    "uncompressed_vs_first_token_b1",
    "cache_bytes_vs_uncompressed",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_real_size", REPO / "benchmarks" / "real_size.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the command on the CPU."""
    output = tmp_path_factory.mktemp("real_size") / "tiny.json"
    before, sys.argv = sys.argv, ["real_size.py", "--shape", "tiny", "--device", "cpu", "--output", str(output)]
    try:
        assert script.main() == 0
    finally:
        sys.argv = before
    return json.loads(output.read_text())


def entries(node: Any) -> list[dict[str, Any]]:
    """Every measured call of a result."""
    if not isinstance(node, dict):
        return []
    return [node] if "times_floor" in node else [one for value in node.values() for one in entries(value)]


def test_the_file_says_what_was_measured_where(result: dict[str, Any]) -> None:
    """A number without its device, commit and shape cannot be compared with anything."""
    assert result["device"] == "cpu" and result["device_details"]["threads"] == torch.get_num_threads()
    assert len(result["commit"]) == 40 and isinstance(result["dirty"], bool)
    assert result["versions"]["torch"] and "--shape tiny" in result["command"]
    assert result["shapes"]["n_patches"] == 16 and result["shapes"]["n_visual"] == 20
    assert set(result["parts"]) == {"ceilings", "model", "compress", "first_token", "generate", "cache", "decode", "train"}


def test_every_ratio_is_there_and_positive(result: dict[str, Any]) -> None:
    ratios = result["ratios"]
    assert set(RATIOS) <= set(ratios)
    assert all(value is not None and value > 0 for value in ratios.values())
    assert ratios["cache_bytes_vs_uncompressed"] == 1 / 16
    assert ratios["compress_share_of_matmul_ceiling_b8"] < 1
    fast, masked = (result["parts"]["compress"]["b8"][name]["ms"] for name in ("fast", "dense_masked"))
    assert ratios["compress_vs_dense_masked_prefill_b8"] == pytest.approx(fast / masked, rel=1e-3)


def test_what_the_cpu_cannot_measure_is_named(result: dict[str, Any]) -> None:
    """An absent number looks like one that was forgotten."""
    assert set(result["not_measured"]) == {"decode/largest_batch", "train/flex_attention"}
    rows = result["parts"]["decode"]["largest_batch_by_bytes"]
    assert rows["ratio"] == (16 + 6 + 3) / (1 + 6 + 3)  # 16 patches or 1 cell, 6 of question, 3 of answer
    assert rows["bytes_per_row"]["1_cached"] == 10 * 2 * 2 * 4 * 8 * 4  # layers, keys and values, heads, width, float32


def test_every_time_stands_beside_its_floor(result: dict[str, Any]) -> None:
    """A time is never below what arithmetic and memory allow, or one of the two was counted wrong."""
    found = entries(result["parts"])
    assert len(found) > 30
    for one in found:
        assert one["ms_min"] <= one["ms"] <= one["ms_max"]
        assert one["times_floor"] > 1 and one["floor_by"] in ("arithmetic", "memory")


def test_counted_flops_are_those_of_the_cost_model(result: dict[str, Any]) -> None:
    """The floors are made of them: a layer that was not counted makes everything look near its limit."""
    decoder = DecoderShape(**result["shapes"]["decoder"])
    whole = prefill_flops(decoder, [21] * 2, n_text=0)
    for batch in (1, 8):
        compress = result["parts"]["compress"][f"b{batch}"]
        for name in ("fast", "dense_masked", "causal_patches"):
            assert compress[name]["flops"] == compress["flops_computed"][name]
        assert compress["general"]["flops"] == compress["dense_masked"]["flops"] == batch * whole
        assert compress["fast"]["flops"] < compress["general"]["flops"]
    for batch in (1, 2):
        first = result["parts"]["first_token"][f"b{batch}"]
        assert set(first["flops_computed"]) == {"from_cache", "text_only", "uncompressed", "from_uncompressed_cache"}
        for name, flops in first["flops_computed"].items():
            assert first[name]["flops"] == flops


def test_the_fast_path_gives_what_the_masked_pass_gives(result: dict[str, Any]) -> None:
    """A wrong answer is always faster."""
    for batch in (1, 8):
        assert result["parts"]["compress"][f"b{batch}"]["fast_vs_general_difference"] < 1e-5


def test_the_compiled_layer_is_one_graph_that_gives_the_same_cells(script: ModuleType) -> None:
    """--compile is tried for the first time on the GPU otherwise; the backend here compiles nothing, but traces as it would."""
    from real_size import bench, compressing, floors, shapes

    shape, device = shapes.SHAPES["tiny"], torch.device("cpu")
    model = shapes.build(shape, device)
    one = compressing.compiled(bench.Bench(model, shape, device, floors.Ceilings(1.0, 1.0)), 2, backend="eager")
    assert one["difference_from_plain"] < 1e-6 and one["images_per_s"] > 0


def test_a_training_step_counts_its_backward_pass(result: dict[str, Any]) -> None:
    """Forward, recomputed forward (checkpointing) and the gradient of the states: at least three forward passes."""
    setting, step = result["parts"]["train"]["setting"], result["parts"]["train"]["sdpa"]
    decoder = DecoderShape(**result["shapes"]["decoder"])
    forward = 2 * prefill_flops(decoder, [20] * 2, n_text=7, n_logits=27)
    assert setting["tokens"] == 2 * 27 and setting["answer_tokens"] == 2 * 3
    assert 3 * forward < step["flops"]


def test_a_part_that_fails_leaves_the_others(script: ModuleType, tmp_path: Path) -> None:
    """Out of memory at batch 64 must not cost the eight minutes before it."""
    from real_size.clock import Journal

    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def broken() -> None:
        raise ValueError("a bug")

    journal = Journal(tmp_path / "out.json", {"device": "cpu"}, script.ratios, limit_s=1000)
    assert journal.attempt("cache", "bytes", lambda: {"ratio": 0.125}) == {"ratio": 0.125}
    assert journal.attempt("decode", "b64", no_memory) is None and journal.n_broken == 0
    assert journal.attempt("decode", "b8", broken) is None and journal.n_broken == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["ratios"]["cache_bytes_vs_uncompressed"] == 0.125
    assert written["ratios"]["first_token_vs_text_only_b1"] is None
    assert written["not_measured"] == {
        "decode/b64": "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "decode/b8": "ValueError: a bug",
    }


def test_after_the_time_limit_nothing_is_begun(script: ModuleType, tmp_path: Path) -> None:
    """A command that is killed at its limit brings nothing back."""
    from real_size.clock import Journal

    journal = Journal(tmp_path / "out.json", {}, script.ratios, limit_s=0)
    assert journal.attempt("train", "sdpa", lambda: pytest.fail("begun")) is None
    assert journal.data["not_measured"] == {"train/sdpa": "not begun: the run's 0 s were over (--limit-s)"}


def test_outputs_that_are_not_finite_are_not_timed(script: ModuleType) -> None:
    from real_size.clock import relative_difference

    assert relative_difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="not finite"):
        relative_difference(torch.tensor([float("nan")]), torch.tensor([1.0]))


def test_a_copy_without_git_is_told_its_commit(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU machine the tree is a copy; --commit never overrides what git says."""
    assert script.origin("abc-dirty")["commit"] == run_info.provenance()["commit"]
    monkeypatch.setattr(run_info, "_git", lambda *words: None)
    assert (script.origin("abc-dirty")["commit"], script.origin("abc-dirty")["dirty"]) == ("abc", True)
    assert (script.origin("abc")["commit"], script.origin("abc")["dirty"]) == ("abc", False)
    assert script.origin(None)["commit"] is None


def test_7b_is_the_presets_model(script: ModuleType) -> None:
    """Measured at another size, the numbers would be about another model."""
    from real_size import shapes

    config = shapes.config_of(shapes.SHAPES["7b"])
    assert DecoderShape.from_config(config.text_config).n_layers == 32 and config.text_config.hidden_size == 4096
    assert config.compressor["quantizer"] == {"preset": "f16c32g8", "image_size": 336}
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (336, 14)
    small = shapes.config_of(shapes.SHAPES["small"])
    assert (small.vision_config.image_size // small.vision_config.patch_size) ** 2 == 576


def test_what_an_image_costs_outside_the_decoder(script: ModuleType) -> None:
    """docs/performance.md names these TFLOPs at 7B: the quantizer costs more than twice the vision tower."""
    from real_size import shapes

    with torch.device("meta"):
        model = HtcVlmForConditionalGeneration(shapes.config_of(shapes.SHAPES["7b"]))
    compressor, pixels = model.model.compressor, torch.empty(1, 3, 336, 336, device="meta")
    costs = [
        count_flops(lambda: model.model.vision_features(pixel_values=pixels)),
        count_flops(lambda: compressor.encode(pixels)),
        count_flops(lambda: compressor.to_anchors(torch.empty(1, 14112, device="meta"))),
    ]
    assert [round(cost / 1e12, 3) for cost in costs] == [0.382, 0.889, 0.001]
    assert 2 * sum(weight.numel() for weight in compressor.to_anchors.parameters()) == pytest.approx(1.0e9, rel=0.01)


def test_examples_in_the_docstrings_run(script: ModuleType) -> None:
    """benchmarks/ is not among the folders whose doctests pytest collects."""
    from real_size import floors

    tried = [doctest.testmod(module) for module in (script, floors)]
    assert all(one.failed == 0 and one.attempted for one in tried)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_graphs_and_the_search_for_the_largest_batch_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything that only CUDA has, at a size of seconds: an error here would cost a run at real size."""
    output = tmp_path / "tiny.json"
    monkeypatch.setattr(sys, "argv", ["real_size.py", "--shape", "tiny", "--device", "cuda", "--output", str(output)])
    assert script.main() == 0
    found = json.loads(output.read_text())
    first = found["parts"]["first_token"]["b1"]
    for side in ("from_cache", "text_only", "uncompressed"):
        assert first[f"{side}_graph"]["difference_from_plain"] < 1e-5
    assert found["parts"]["decode"]["largest_batch_1_cached"]["rows"] > 1
    assert not found["not_measured"]
