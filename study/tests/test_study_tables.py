"""The study's tables, their reading and their plots, from result files made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from study import answers, ladder
from study.cli import table as table_command
from study.definitions import Comparison, followed, read_experiment, read_tables
from study.grids import cost_grid, csv_grid, differences_grid, entries_grid, lines_grid, retention_grid, scores_grid
from study.study_tables import compared, load_table, retention, separating

REPO = Path(__file__).resolve().parents[2]
N_IMAGES, N_EACH = 40, 4  # pictures, questions of each: two of kind "name", two of kind "count"
TABLES = {
    "table1": {
        "title": "One token", "rows": ["upper", "a", "b", "c", "d", "lower"], "lower": "table1/lower", "upper": "table1/upper",
        "columns": {"main": ["scenes/*"]},
        "compare": [["table1/a", "table1/b", "a against b"], ["table1/a", "table1/c", "a against c"]],
    },
    "table2": {"title": "Budgets", "rows": ["a-192", "d-192"], "columns": {"main": ["scenes/*"]}, "lower": "table1/lower",
               "upper": "table1/upper", "lines": {"A": ["a-192"], "D": ["d-192"]}},
}  # fmt: skip


def questions() -> answers.QuestionSet:
    n = N_IMAGES * N_EACH
    blind, ceiling = {"score": 10, "name": 0, "count": 20}, {"score": 75, "name": 50, "count": 100}
    baselines = {"question only": blind, "bag of things": ceiling}
    return answers.QuestionSet("scenes", "f" * 64, ("name", "count"), np.arange(n) % 2, np.arange(n) // N_EACH, baselines)


def result(right: np.ndarray, seed: int, steps: int | None = 100, **more: Any) -> dict[str, Any]:
    training = None if steps is None else {"steps": steps, "seconds": 60.0, "images_per_second": 9.0, "loss": 1.0}
    kept = {"scenes": {"questions_sha256": "f" * 64, "n_questions": len(right), "right": answers.packed_bits(right)}}
    return {
        "metrics": answers.metrics_of("scenes", right, questions()), "answers": kept, "seed": seed, "training": training,
        "cached_tokens": 1.0, "equivalent_tokens": 37.0, "device": "cpu", "seconds": 61.0, **more,
    }  # fmt: skip


def share(name: float, count: float) -> np.ndarray:
    """The first `name` of the pictures have their name questions right, the first `count` their count questions."""
    image, kind = np.arange(N_IMAGES * N_EACH) // N_EACH, np.arange(N_IMAGES * N_EACH) % 2
    return np.asarray(image < np.where(kind == 0, name, count) * N_IMAGES)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """upper 90/80, lower 10/20; a two seeds 30/60 and 50/80; b 20/40; c not run; d refused."""
    files = {"defaults": {}, "tables": TABLES, "table2/a-192": {"title": "A @192", "same_as": "table1/a"}}
    files |= {f"table1/{row}": {"title": row.upper()} for row in TABLES["table1"]["rows"]}  # type: ignore[attr-defined]
    files["table2/d-192"] = {"title": "D @192", "same_as": "table1/d"}
    for name, content in files.items():
        file = tmp_path / "experiments" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(content))
    runs = {
        "upper/0": result(share(0.9, 0.8), 0, steps=None), "lower/0": result(share(0.1, 0.2), 0, steps=None),
        "a/0": result(share(0.3, 0.6), 0), "a/1": result(share(0.5, 0.8), 1), "b/0": result(share(0.2, 0.4), 0),
        "d/0": {"metrics": {}, "impossible": "d needs a class token", "seed": 0, "training": None},
    }  # fmt: skip
    for name, content in runs.items():
        file = tmp_path / "results" / "table1" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    answers.write_questions(tmp_path / "results", questions())
    return tmp_path


def load(study: Path, name: str = "table1") -> Any:
    return load_table(name, study / "experiments", study / "results")


def test_scores_stand_beside_baselines_and_missing_rows_are_shown(study: Path) -> None:
    """a: name (30 + 50) / 2 = 40, count 70, mean 55, deviations 14.1. Prevents a table that hides what was not run."""
    lines = scores_grid(load(study))
    assert lines[0] == ["row", "tokens", "name", "count", "mean", "seeds"]
    by_row = {line[0]: line[1:] for line in lines[1:]}
    assert by_row["A"] == ["1", "40.0 ± 14.1", "70.0 ± 14.1", "55.0 ± 14.1", "2"]
    assert by_row["C"][1] == "not run" and by_row["D"][1] == "impossible"
    assert by_row["*blind: question only*"] == ["", "0.0", "20.0", "10.0", ""]
    assert by_row["*ceiling: knows what, not where*"] == ["", "50.0", "100.0", "75.0", ""]


def test_the_first_token_s_time_is_that_of_one_run_of_all_rows(study: Path) -> None:
    """Times taken row by row, hours apart, say more of the machine than of the method; D @192 shows A's row and its time."""
    assert load(study).rows[1].first_token_ms is None
    path = study / "results" / "first_token.json"
    path.write_text(json.dumps({"rows": {"table1/a": {"ms": 12.5, "low": 12, "high": 13}}}))
    assert load(study).rows[1].first_token_ms == load(study, "table2").rows[0].first_token_ms == 12.5
    cells = {line[0]: line[5] for line in cost_grid(load(study))[1:]}
    assert cells["A"] == "12.5" and cells["B"] == ""
    for damaged in ("{", '{"rows": {"table1/a": {"ms": "soon"}}}', '{"times": 1}', '{"rows": [1]}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"first_token\.json: damaged .* run benchmarks/first_token.py again"):
            load(study)


def test_retention_by_both_formulas(study: Path) -> None:
    """a: (40 - 10) / 80 = 37.5 and (70 - 20) / 60 = 83.3, mean 60.4; of the upper bound 44.4 and 87.5, mean 66.0."""
    by_row = {line[0]: line[1:] for line in retention_grid(load(study))[1:]}
    assert by_row["A"] == ["60.4", "60.4", "37.5 (count)", "66.0", "66.0", "44.4 (count)"]
    assert by_row["C"][0] == "not run" and by_row["UPPER"][0] == by_row["UPPER"][3] == "100.0"


def test_a_column_that_the_bounds_do_not_separate_has_no_retention(study: Path) -> None:
    """Bounds 4 points apart make 25 points of retention out of one; the paper's ScienceQA column counts 121 %."""
    file = study / "results/table1/lower/0.json"
    content = json.loads(file.read_text())
    content["metrics"]["scenes/count"] = 76.0
    file.write_text(json.dumps(content))
    table = load(study)
    assert separating(table, table.columns()) == (["scenes/name"], ["scenes/count"])
    assert retention(table, table.rows[1], ["scenes/name"]) is None


def test_a_comparison_pairs_the_seeds_that_both_rows_have(study: Path) -> None:
    """Only seed 0 is common: a 30/60 against b 20/40, 15 points. All seeds of a would give 25."""
    table = load(study)
    found = compared(table, Comparison("table1/a", "table1/b", ""), "scenes/score")
    assert found is not None and found.difference.points == pytest.approx(15) and found.n_seeds == (1, 1)
    assert found.verdict == "above" and found.difference.low > 0
    assert found.by_seed == (pytest.approx(15),)
    assert compared(table, Comparison("table1/a", "table1/c", ""), "scenes/score") is None
    rows = differences_grid(table)
    assert rows[1][1].startswith("**+15.0 [") and rows[2][1] == "not run"


def test_what_each_seed_says_stands_beside_the_interval(study: Path) -> None:
    """Seed 0: 45 - 30 = +15, seed 1: 65 - 75 = -10. The interval over pictures does not show that they disagree."""
    (study / "results/table1/b/1.json").write_text(json.dumps(result(share(0.7, 0.8), 1)))
    table = load(study)
    found = compared(table, Comparison("table1/a", "table1/b", ""), "scenes/score")
    assert found is not None and found.by_seed == (pytest.approx(15), pytest.approx(-10))


def test_rows_that_were_asked_other_questions_are_named(study: Path) -> None:
    """Another limit, or another version of the data: the numbers do not belong in one table."""
    other = answers.QuestionSet("scenes", "e" * 64, ("name", "count"), np.arange(8) % 2, np.arange(8) // 4, {})
    answers.write_questions(study / "results", other)
    file = study / "results/table1/b/0.json"
    content = json.loads(file.read_text())
    content["answers"]["scenes"]["questions_sha256"] = "e" * 64
    file.write_text(json.dumps(content))
    table = load(study)
    assert table.other_questions() == ["B"]
    assert compared(table, Comparison("table1/a", "table1/b", ""), "scenes/score") is None


def test_the_command_writes_markdown_csv_and_a_picture(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three forms of one table; the CSV has the numbers, and rows that were not run."""
    common = ["--results", str(study / "results"), "--experiments", str(study / "experiments")]
    table_command.run(["table1", *common])
    assert "| A | 1 | 40.0 ± 14.1 |" in capsys.readouterr().out
    table_command.run(["table1", *common, "--format", "csv"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("row,title,results,status,seeds")
    assert any(line.startswith("c,C,table1/c,not run") for line in printed)
    assert "scenes/name (sd)" in csv_grid(load(study))[0]
    for name in ("table1", "table2"):
        table_command.run([name, *common, "--format", "png", "--output", str(study / f"{name}.png")])
        assert (study / f"{name}.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="a picture needs a file"):
        table_command.run(["table1", *common, "--format", "png"])


def test_budgets_have_a_line_per_method(study: Path) -> None:
    """Prevents a method that refuses a budget from vanishing from the overview."""
    assert lines_grid(load(study, "table2")) == [["method", "@192"], ["A", "55.0 ± 14.1, 66.0 % (1)"], ["D", "impossible"]]


def test_a_damaged_result_is_an_error_that_names_it(study: Path) -> None:
    """Left out silently, a row would turn into "not run"."""
    file = study / "results/table1/b/0.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="b/0.json: damaged"):
        load(study)
    file.write_text("{}")
    with pytest.raises(ValueError, match="no 'metrics'"):
        load(study)


def test_question_files_survive_and_damage_is_found(study: Path) -> None:
    """Bits without their questions can be compared with nothing."""
    found = answers.read_questions(study / "results", "scenes", "f" * 64)
    assert found.kinds == ("name", "count") and found.image_of.tolist() == questions().image_of.tolist()
    with pytest.raises(ValueError, match="asks no 'where'"):
        found.of_kind("where")
    file = answers.questions_file(study / "results", "scenes", "f" * 64)
    file.write_text(file.read_text().replace('"kind_of": "', '"kind_of": "!'))
    with pytest.raises(ValueError, match="damaged"):
        answers.read_questions(study / "results", "scenes", "f" * 64)
    with pytest.raises(ValueError, match="hold no 99 answers"):
        answers.unpacked_bits(answers.packed_bits([True]), 99)


def test_the_study_of_this_repository_is_whole() -> None:
    """Every row of every table has its file, every file is in a table, every comparison has both sides."""
    root = REPO / "study" / "experiments"
    for name, table in read_tables(root).items():
        assert {path.stem for path in (root / name).glob("*.yaml")} == set(table.rows)
        for row in table.rows:
            assert read_experiment(root / name / f"{row}.yaml").title and followed(root / name / f"{row}.yaml")
        sides = [side for pair in table.compare for side in (pair.first, pair.second)]
        bounds = [bound for bound in (table.lower, table.upper) if bound]
        for side in (*sides, *bounds):
            assert (root / f"{side}.yaml").is_file(), side
        assert {member for members in table.lines.values() for member in members} <= set(table.rows)


def test_an_elastic_row_says_what_its_first_entries_keep(study: Path) -> None:
    """Right by hand: means over the two seeds, and no line for rows that have one size only."""
    for seed, (one, two) in enumerate(((50.0, 60.0), (52.0, 66.0))):
        file = study / "results" / "table1" / "a" / f"{seed}.json"
        kept = {str(n): {"metrics": {"scenes/score": score}} for n, score in ((1, one), (2, two))}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"by_entries": kept}))
    assert entries_grid(load(study)) == [["row", "entries", "scenes"], ["A", "1", "51.0"], ["A", "2", "63.0"]]


def test_an_elastic_model_stands_in_the_plot_once_for_each_number_of_entries(tmp_path: Path) -> None:
    """By hand: 6,144 bytes an entry, means over two seeds; the largest budget is the row's own score."""
    folder = tmp_path / "long" / "readers-elastic"
    folder.mkdir(parents=True)
    for seed, (one, all_two) in enumerate(((90.0, 95.0), (92.0, 97.0))):
        score = [{"metrics": {"pictograms-seen/score": value}} for value in (one, all_two)]
        (folder / f"{seed}.json").write_text(json.dumps({"by_entries": {"1": score[0]}, "cached_tokens": 2.0, **score[1]}))
    assert ladder.elastic_row(tmp_path) == [(6144, 91.0), (12288, 96.0)]
