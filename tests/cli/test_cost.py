"""`htc-vlm cost`: the published budgets of every method, and numbers that were worked out elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlavaConfig, OPTConfig, Qwen2Config

from htc_vlm import compressors
from htc_vlm.applied import cost_table
from htc_vlm.cli import cost
from htc_vlm.ops.cost import LLAMA_7B

SUFFIX = {("plus",): "+", ("n_fusion",): " without pre-fusion"}


def table(budget: int) -> dict[str, cost_table.Row]:
    rows, missing = cost_table.rows(budget, 576, LLAMA_7B, n_text=40)
    assert missing == {}
    return {row.method + SUFFIX.get(tuple(row.settings)[-1:], ""): row for row in rows}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (192, {"fastv": 191.6, "pyramid_drop": 192.1, "sparse_vlm": 206.5, "sparse_vlm+": 206.8, "avg_pool": 196.0}),
        (128, {"fastv": 127.9, "pyramid_drop": 128.4, "sparse_vlm": 145.4, "sparse_vlm+": 144.1, "avg_pool": 121.0}),
        (64, {"fastv": 64.1, "pyramid_drop": 63.9, "sparse_vlm": 82.3, "sparse_vlm+": 81.8, "avg_pool": 64.0}),
    ],
)
def test_published_budgets_as_means_over_layers(budget: int, expected: dict[str, float]) -> None:
    """docs/specs/baselines.md sections 5 to 7: the same name, "64 tokens", stands for 64 to 82 of them."""
    rows = table(budget)
    means = {name: row.equivalent_tokens for name, row in rows.items()}
    exact = dict.fromkeys(("random_drop", "divprune", "tome", "visionzip", "qformer"), float(budget))
    exact |= dict.fromkeys(("llava_mini", "llava_mini without pre-fusion"), expected["avg_pool"])
    expected = {**expected, **exact, "none": 576.0, "voco": 576.0 + budget, "htc": 580.0 + budget}
    expected["readers"] = 576.0 + 8 * budget  # eight rows read for each entry
    assert {name: means[name] for name in expected} == pytest.approx(expected, abs=0.06)


def test_the_authors_own_numbers_stand_beside() -> None:
    """SparseVLM's 64 and the bottleneck's 64 are counted otherwise."""
    authors = {name: row.authors_tokens for name, row in table(64).items() if row.authors_tokens is not None}
    assert authors["sparse_vlm"] == pytest.approx(64.8, abs=0.06)
    assert authors["sparse_vlm+"] == pytest.approx(64.4, abs=0.06)
    assert authors["htc"] == authors["voco"] == 64


def test_flops_and_bytes_of_llava() -> None:
    """8.178 TFLOPs for 576 patches and 40 words (docs/specs/ecosystem.md section 7); half a MiB per fp16 entry."""
    rows = table(64)
    assert rows["none"].prefill_tflops == pytest.approx(8.178, abs=0.001)
    assert rows["none"].cache_mib == 288
    assert rows["htc"].cache_mib == rows["divprune"].cache_mib == 32
    assert rows["fastv"].again_tflops == rows["fastv"].prefill_tflops  # another question, another choice
    assert rows["htc"].prefill_tflops > rows["none"].prefill_tflops > rows["sparse_vlm"].prefill_tflops
    assert rows["htc"].again_tflops < 0.6


def test_pre_fusion_costs_what_its_layers_cost() -> None:
    """LLaVA-Mini's one token would look free: 1.96 TFLOPs with pre-fusion, 0.96 without (docs/specs/baselines.md section 8)."""
    rows, _ = cost_table.rows(1, 576, LLAMA_7B, n_text=40)
    with_it, without = (row for row in rows if row.method == "llava_mini")
    assert with_it.prefill_tflops - without.prefill_tflops == pytest.approx(1.96 - 0.96, abs=0.05)
    assert (with_it.question_independent, without.question_independent) == (False, True)
    assert with_it.again_tflops == with_it.prefill_tflops > without.again_tflops


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables in a README are pasted from here."""
    assert cost.run(["llava-1.5-7b", "--budget", "64"]) == 0
    assert "| fastv | n_keep=30, layer=2 | 576 x2, 30 x30 | 64.1 |" in capsys.readouterr().out
    assert cost.run(["llava-1.5-7b", "--budget", "100", "--format", "json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert "known: 192, 128, 96, 64" in out["missing"]["sparse_vlm"]


def test_impossible_budgets_are_refused() -> None:
    """577 of 576."""
    with pytest.raises(ValueError, match="1 to 576"):
        cost.run(["llava-1.5-7b", "--budget", "577"])


def test_a_budget_may_be_a_share_of_the_patches() -> None:
    """"11 % of the tokens" is how papers name budgets; 64 of 576 is 11.1 %."""
    assert compressors.get("divprune").for_budget(0.11, 576, 32) == {"n_keep": 63}
    assert compressors.get("fastv").for_budget(64 / 576, 576, 32) == {"n_keep": 30, "layer": 2}
    assert compressors.get("visionzip").for_budget(64, 576, 32) == {"n_dominant": 54, "n_contextual": 10}


@pytest.mark.parametrize("wrong", [0, 577, 1.5, -0.1, True])
def test_a_budget_outside_the_patches_is_refused_by_every_method(wrong: float) -> None:
    """A share written as a percentage must not become a number of tokens."""
    for name in compressors.names():
        if name != "none":  # keeps all, whatever the budget
            with pytest.raises(ValueError, match=f"{name}: a budget is 1 to 576 tokens, or a share"):
                compressors.get(name).for_budget(wrong, 576, 32)


def test_the_scaled_tables_are_named_in_tokens_of_this_model() -> None:
    """The refusal of 32 of 64 tokens spoke of budget=288, which nobody had given."""
    with pytest.raises(ValueError, match="tables for 12, 8, 6, 4 of 36 tokens, not for 10"):
        compressors.get("sparse_vlm").for_budget(10, 36, 8)
    assert compressors.get("sparse_vlm").for_budget(12, 36, 8) == {"layers": (0, 1, 3), "keep": (19, 12, 7)}


def test_a_method_without_budgets_says_what_to_give_instead() -> None:
    """The default of a new method."""

    class Mine(compressors.Compressor):
        name = "mine"

    with pytest.raises(ValueError, match="mine has no settings for a budget; give its own settings instead: none"):
        Mine.for_budget(64, 576, 32)


def original_config(**options: object) -> dict[str, object]:
    """config.json of an original LLaVA-1.5 folder with another language model."""
    return {
        "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "vocab_size": 1000,
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    } | options  # fmt: skip


def test_an_original_checkpoint_is_counted_by_its_own_configuration(tmp_path: Path) -> None:
    """Its flat config.json has no text_config, and the 7B's numbers were printed for any such folder."""
    (tmp_path / "config.json").write_text(json.dumps(original_config()))
    model = cost.find_model(str(tmp_path), (480, 640))
    assert (model.n_patches, model.decoder.n_layers, model.decoder.width, model.decoder.n_kv_heads) == (576, 8, 256, 4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 256}))
    with pytest.raises(ValueError, match="no text_config, so it is no LLaVA"):
        cost.find_model(str(tmp_path), (480, 640))


def test_a_llava_on_another_language_model_is_counted_or_refused_by_name(tmp_path: Path) -> None:
    """A LLaVA on Qwen2 or Phi was a traceback: their configurations have no head_dim."""
    for kind in (Qwen2Config(), OPTConfig()):
        LlavaConfig(text_config=kind, image_token_index=5).save_pretrained(tmp_path)
        if kind.model_type == "opt":
            with pytest.raises(ValueError, match="'opt' cannot be counted"):
                cost.find_model(str(tmp_path), (480, 640))
        else:
            assert cost.find_model(str(tmp_path), (480, 640)).decoder.head_dim == kind.hidden_size // kind.num_attention_heads


def test_the_default_budget_fits_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """`cost tiny` refused its own default of 64 tokens, since an image has 36 patches; its FLOPs were all 0.000."""
    assert cost.run(["tiny"]) == 0
    told = capsys.readouterr()
    assert "| divprune | n_keep=4 |" in told.out and "GFLOPs" in told.out and "KV KiB" in told.out
    assert "| 0.000 |" not in told.out and "You are using a model of type" not in told.err
