"""Retention, the paper's tables, and tables from result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from htc_vlm.cli import eval as eval_command
from htc_vlm.eval.retention import retention_between, retention_of_upper, row_mean
from study.cli import table
from study.paper import elsewhere_rows, paper_markdown, table1_rows, table2_rows
from study.tables import read_results, render

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


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two bounds and a row with two seeds: a 20..40..., b 50..90."""
    runs = {
        "upper-bound/0": (40, 90), "lower-bound/0": (20, 50), "htc/0": (30, 80), "htc/1": (34, 84), "blind/0": (10,)
    }  # fmt: skip
    for name, scores in runs.items():
        path = tmp_path / "table1" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics = dict(zip(("a", "b"), scores, strict=False))
        path.write_text(json.dumps({"metrics": metrics, "seconds": 60, "seed": int(name[-1])}))
    return tmp_path


def test_a_table_is_rebuilt_from_files(results: Path) -> None:
    """htc: a 32 +- 2.83, b 82 +- 2.83; retention (60 + 80) / 2 = 70, without b 60. Prevents typed tables."""
    lines = render(results / "table1", ("upper-bound", "htc", "lower-bound"))
    assert lines[0] == ["row", "a", "b", "retention", "capped at 100", "without the most generous", "seeds", "seconds"]
    assert [line[0] for line in lines[1:]] == ["upper-bound", "htc", "lower-bound", "blind"]
    assert lines[2] == ["htc", "32.0 ± 2.8", "82.0 ± 2.8", "70.0", "70.0", "60.0 (b)", "2", "60"]
    assert lines[4] == ["blind", "10.0", "", "", "", "", "1", "60"]


def test_the_table_command_prints_markdown_and_csv(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents two renderings that disagree."""
    table.run(["table1", "--results", str(results), "--experiments", str(results)])
    assert "| htc | 32.0 ± 2.8 |" in capsys.readouterr().out
    table.run(["table1", "--results", str(results), "--experiments", str(results), "--format", "csv"])
    assert "htc,32.0 ± 2.8," in capsys.readouterr().out


def test_no_results_and_unequal_seeds_are_errors(results: Path) -> None:
    """Prevents an empty table, and a mean over seeds that measured different things."""
    with pytest.raises(ValueError, match="no results"):
        read_results(results / "table9")
    (results / "table1" / "htc" / "2.json").write_text('{"metrics": {"a": 1}}')
    with pytest.raises(ValueError, match="row htc"):
        render(results / "table1")


def test_eval_options_are_checked_before_the_model_is_loaded() -> None:
    """Prevents a misspelt task from costing a model load."""
    with pytest.raises(ValueError, match="unknown task 'gqq'"):
        eval_command.run(["no-such-model", "--task", "gqq"])
    with pytest.raises(ValueError, match="which --task does not run"):
        eval_command.run(["no-such-model", "--task", "gqa", "--set", "pope.headline=f1"])
    with pytest.raises(ValueError, match="TASK.OPTION=VALUE"):
        eval_command.run(["no-such-model", "--task", "gqa", "--set", "headline=f1"])
