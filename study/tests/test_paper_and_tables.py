"""Retention, the paper's tables, and tables from result files."""

from __future__ import annotations

import pytest

from htc_vlm.cli import eval as eval_command
from htc_vlm.eval.retention import retention_between, retention_of_upper, row_mean
from study.cli import table
from study.paper import elsewhere_rows, paper_markdown, table1_rows, table2_rows

ROWS = {row.name: row for row in [*table1_rows(), *table2_rows()]}


def test_bounds_that_separate_nothing_are_refused() -> None:
    """Prevents a division by zero, and a percentage of a task on which blind is as good as seeing."""
    with pytest.raises(ValueError, match="lower < upper"):
        retention_between(50, 60, 60)
    with pytest.raises(ValueError, match="above 0"):
        retention_of_upper(50, 0)


def test_a_row_mean_shows_what_one_column_does_to_it() -> None:
    """(50 + 70 + 150) / 3 = 90, capped (50 + 70 + 100) / 3, without the 150 it is 60."""
    mean = row_mean({"a": 50, "b": 70, "c": 150})
    assert (mean.printed, mean.capped, mean.without_most_generous, mean.most_generous) == pytest.approx(
        (90, 220 / 3, 60, "c")
    )


def test_htc_and_voco_rows_of_table_1_are_right_as_printed() -> None:
    """docs/specs/baselines.md 0.1: 87.21 and 81.01; capped 84.25 and without ScienceQA 81.6 for HTC."""
    assert ROWS["HTC"].wrong_columns == [] and ROWS["VoCo"].wrong_columns == []
    assert ROWS["HTC"].mean.printed == pytest.approx(87.21, abs=0.01)
    assert ROWS["HTC"].mean.capped == pytest.approx(84.25, abs=0.01)
    assert ROWS["HTC"].mean.without_most_generous == pytest.approx(81.6, abs=0.05)


@pytest.mark.parametrize("name", ["Q-Former", "AvgPool"])
def test_misplaced_columns_are_found(name: str) -> None:
    """docs/specs/baselines.md 0.1: six of seven cells stand under the wrong score; the means are right."""
    assert ROWS[name].wrong_columns == ["VQAv2", "MMBench", "MME-P", "POPE", "SEED", "SQA-IMG"]
    assert "column order" in ROWS[name].remarks[0] and not ROWS[name].mean_is_wrong


def test_the_copied_tome_row_and_its_mean_are_found() -> None:
    """docs/specs/baselines.md 0.2: 88.9 is printed, the cells give 81.84; PDrop@128's 95.4 belongs to 61.6."""
    row = ROWS["ToMe@192"]
    assert row.mean.printed == pytest.approx(81.84, abs=0.01) and row.mean_is_wrong
    assert any("copy" in remark for remark in row.remarks)
    assert ROWS["PDrop@128"].wrong_columns == ["MMBench"]
    assert [name for name, row in ROWS.items() if row.mean_is_wrong] == ["ToMe@192", "PDrop@128"]


@pytest.mark.parametrize(
    ("name", "mean"), [("FastV@192", 87.90), ("SparseVLM@192", 99.12), ("HTC@192", 94.18), ("PDrop@128", 94.16),
                       ("ToMe@64", 71.12), ("SparseVLM@64", 89.32), ("VoCo@64", 89.59), ("HTC@64", 89.78)]
)  # fmt: skip
def test_table_2_means_are_those_recomputed_by_hand(name: str, mean: float) -> None:
    """docs/specs/baselines.md 0.2 lists them."""
    assert ROWS[name].mean.printed == pytest.approx(mean, abs=0.01)


def test_published_voco_on_the_same_scale() -> None:
    """docs/specs/baselines.md 0.1: VoCo-LLaMA's own paper gives 83.7, not HTC-VLM's rerun of 81.0; LLaVA-Mini 109.8."""
    printed = [round(mean.printed, 1) for mean in elsewhere_rows().values()]
    assert printed == [83.7, 109.8]


def test_table_paper_prints_marks(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents the discrepancies from being known to the code but not to the reader."""
    assert table.run(["paper"]) == 0
    printed = capsys.readouterr().out
    assert printed == paper_markdown()
    assert "88.9 / 81.8 **!**" in printed and "70.5 / 60.8 **!**" in printed and "33.0 %" in printed


def test_an_unknown_table_is_refused_by_name() -> None:
    """The error lists what there is."""
    with pytest.raises(ValueError, match=r"no table 'table9'.*there are: paper, table1"):
        table.run(["table9"])


def test_eval_options_are_checked_before_the_model_is_loaded() -> None:
    """Prevents a misspelt task from costing a model load."""
    with pytest.raises(ValueError, match="unknown task 'gqq'"):
        eval_command.run(["no-such-model", "--task", "gqq"])
    with pytest.raises(ValueError, match="which --task does not run"):
        eval_command.run(["no-such-model", "--task", "gqa", "--set", "pope.headline=f1"])
    with pytest.raises(ValueError, match="TASK.OPTION=VALUE"):
        eval_command.run(["no-such-model", "--task", "gqa", "--set", "headline=f1"])
