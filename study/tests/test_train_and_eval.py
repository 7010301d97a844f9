"""`python -m study train-and-eval`: what is missing is built, what is there is left alone, what was cut off goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from htc_vlm.eval.task import make_task
from htc_vlm.model.loading import load
from study import answers, evaluating
from study.cli import step_time, train_and_eval
from tests import processes, tiny_runs

N_QUESTIONS = 36  # of 3 scenes
ROWS: dict[str, dict[str, Any]] = {
    "table1/upper": {"stage": None},
    "table1/lower": {"stage": None, "compressor": {"name": "voco"}},
    "table1/voco": {"compressor": {"name": "voco"}},
    "table1/htc": {"compressor": tiny_runs.HTC},
    "table4/shuffled": {"compressor": {**tiny_runs.HTC, "anchor_source": "shuffled"}},
    "table4/hybrid": {"same_as": "table1/htc"},
    "table2/random": {"stage": None, "method": {"name": "random_drop", "share": 288}},
    "table2/fastv": {"stage": None, "method": {"name": "fastv", "n_keep": 2, "layer": 1}},
    "table2/tome": {"stage": None, "method": {"name": "tome", "n_keep": 2}},
    "table2/fastv-64": {"stage": None, "method": {"name": "fastv", "share": 64}},
    "table2/pool": {"stage": None, "method": {"name": "avg_pool", "n_tokens": 3}},
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with experiments/ on a tiny preset and the tiny checkpoint of the tests."""
    tiny_runs.tower()
    preset = tiny_runs.write_preset(tmp_path)
    defaults = {
        "preset": str(preset), "stage": "compress", "start": str(tiny_runs.checkpoint(tiny_runs.NONE)),
        "mgvq": str(tiny_runs.quantizer()), "training": {"steps": 3, "save_every": 1},
        "tasks": {"scenes": {"task": "pictograms", "split": "test-unseen", "limit": N_QUESTIONS}},
    }  # fmt: skip
    write(tmp_path, "defaults", defaults)
    for name, settings in ROWS.items():
        write(tmp_path, name, settings)
    return tmp_path


def write(study: Path, name: str, settings: dict[str, Any]) -> None:
    file = study / "experiments" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))


def arguments(study: Path, *names: str, more: tuple[str, ...] = ()) -> list[str]:
    files = [str(study / "experiments" / f"{name}.yaml") for name in names]
    places = ["--output", str(study / "results"), "--work", str(study / "work"), "--cache", str(tiny_runs.cache())]
    return [*files, *places, "--device", "cpu", *more]


def result(study: Path, name: str, seed: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((study / "results" / name / f"{seed}.json").read_text())
    return content


def test_an_elastic_row_is_asked_with_each_number_of_entries(study: Path) -> None:
    """One checkpoint for several budgets is worth what each of them keeps. With all entries it is the row's own score."""
    elastic = {"name": "readers", "n_readers": 2, "n_bottleneck": 2, "elastic": True}
    write(study, "long/elastic", {"compressor": elastic, "training": {"steps": 2}})
    assert train_and_eval.run(arguments(study, "long/elastic")) == 0
    found = result(study, "long/elastic")
    assert list(found["by_entries"]) == ["1"] and found["cached_tokens"] == 2
    assert set(found["by_entries"]["1"]["metrics"]) == set(found["metrics"])
    folder = study / "work" / "long" / "elastic" / "0"
    model, processor = load(folder / "train" / "model")
    tests = evaluating.task_set("scenes", "pictograms", "test-unseen", N_QUESTIONS, "data")
    cache = evaluating.features_of(tests, model.model.vision_tower, tiny_runs.cache())
    sizes = [evaluating.SharedAnswerer(model, processor, tests, cache, None, n).cells for n in (1, 2, None)]
    assert [cells.n_bottleneck for cells in sizes if cells is not None] == [1, 2, 2]
    lines = (folder / "eval" / "scenes@1" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == N_QUESTIONS


def test_a_trained_row_becomes_a_result_file_with_all_that_checks_ask_for(study: Path, capsys: Any) -> None:
    """A number without its config, commit or answers could be neither repeated nor compared."""
    assert train_and_eval.run(arguments(study, "table1/htc")) == 0
    found = result(study, "table1/htc")
    assert found["seed"] == 0 and found["device"] == "cpu" and found["training"]["steps"] == 3
    assert {"commit", "dirty", "command", "versions", "seconds", "evaluation_seconds"} <= set(found)
    assert found["command"] == "python -m study train-and-eval study/experiments/table1/htc.yaml --seeds 0"
    n_visual = tiny_runs.N_PATCHES + 2
    assert found["schedule"] == [n_visual + 1] * tiny_runs.N_LAYERS and found["cached_tokens"] == 1
    kept = found["answers"]["scenes"]
    questions = answers.read_questions(study / "results", "scenes", kept["questions_sha256"])
    right = answers.unpacked_bits(kept["right"], kept["n_questions"])
    assert len(questions) == len(right) == N_QUESTIONS and questions.n_images == 3
    assert found["metrics"]["scenes/score"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert set(questions.baselines) == {"question only", "majority", "bag of things"}
    before = (study / "results/table1/htc/0.json").read_bytes()
    assert train_and_eval.run(arguments(study, "table1/htc", "table4/hybrid")) == 0
    assert (study / "results/table1/htc/0.json").read_bytes() == before
    assert "1 of 1 results are there" in capsys.readouterr().out


def test_metrics_are_those_of_the_task_itself(study: Path) -> None:
    """Two ways to score that disagree: the table would say one thing, `htc-vlm eval` another."""
    train_and_eval.run(arguments(study, "table1/voco"))
    lines = (study / "work/table1/voco/0/eval/scenes/answers.jsonl").read_text().splitlines()
    texts = {row["id"]: row["answer"] for row in map(json.loads, lines)}
    items = make_task("pictograms").load(study, "test-unseen")[:N_QUESTIONS]
    expected = {f"scenes/{kind}": value for kind, value in make_task("pictograms").score(items, texts).items()}
    assert result(study, "table1/voco")["metrics"] == pytest.approx(expected, abs=1e-3)


def test_rows_without_training_and_methods_that_refuse(study: Path) -> None:
    """A method that cannot run here is a row that says why, not a row that is missing."""
    names = ("table1/upper", "table1/lower", "table2/random", "table2/fastv", "table2/tome", "table2/fastv-64", "table2/pool")
    assert train_and_eval.run(arguments(study, *names, more=("--seeds", "0,1"))) == 0
    assert result(study, "table1/upper")["schedule"] == [4, 4] and result(study, "table1/upper")["training"] is None
    assert result(study, "table2/random")["schedule"] == [2, 2]
    assert result(study, "table2/random", 1)["config"]["method"] == {"name": "random_drop", "n_keep": 2, "seed": 1}
    assert result(study, "table2/fastv")["schedule"] == [4, 2]
    assert not (study / "results/table1/upper/1.json").exists()
    for name, words in (("tome", "vision tower"), ("fastv-64", "64 of 576"), ("pool", "square")):
        assert words in result(study, f"table2/{name}")["impossible"] and result(study, f"table2/{name}")["metrics"] == {}


def test_shuffled_codes_run_also_when_one_picture_is_left_over(study: Path) -> None:
    """A last batch of one picture has nobody to exchange codes with."""
    more = ("--set", "tasks.scenes.limit=25", "--batch-size", "12")
    assert train_and_eval.run(arguments(study, "table4/shuffled", more=more)) == 0
    assert result(study, "table4/shuffled")["answers"]["scenes"]["n_questions"] == 25


def test_a_result_of_another_config_is_never_overwritten(study: Path) -> None:
    """The silent alternative: a table whose rows were trained for different numbers of steps."""
    train_and_eval.run(arguments(study, "table1/upper"))
    before = (study / "results/table1/upper/0.json").read_bytes()
    with pytest.raises(ValueError, match="tasks.scenes.n_questions was 36, is 24.*Nothing is overwritten"):
        train_and_eval.run(arguments(study, "table1/upper", "table1/voco", more=("--set", "tasks.scenes.limit=24")))
    assert (study / "results/table1/upper/0.json").read_bytes() == before
    assert not (study / "work/table1/voco").exists()  # refused before anything was run


def test_a_run_in_progress_of_another_config_is_not_gone_on_with(study: Path) -> None:
    """transformers' Trainer would resume from the other run's checkpoint without a word."""
    train_and_eval.run(arguments(study, "table1/voco"))
    (study / "results/table1/voco/0.json").unlink()
    with pytest.raises(ValueError, match="training.settings.learning_rate was 0.01, is 0.1"):
        train_and_eval.run(arguments(study, "table1/voco", more=("--set", "training.learning_rate=1e-1")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: [compress", "htc.yaml: not YAML"),
        ("- htc", "expected keys with values"),
        ("compresor: {name: voco}", "unknown key 'compresor'"),
        ("training: {stepz: 3}", "unknown stage setting 'stepz'"),
        ("compressor: {name: vocco}", "unknown compressor 'vocco'"),
        ("compressor: {name: voco, n_anchors: 2}", "voco has no setting 'n_anchors'"),
        ("{stage: null, method: {name: fastv, keep: 2}}", "fastv has no setting 'keep'"),
        ("start: runs/nowhere", "runs/nowhere: no such folder"),
        ("{stage: null, start: null}", "nothing to evaluate"),
        ("tasks: {scenes: {task: pictograms, split: tset}}", "no split 'tset'"),
        ("tasks: {scenes: {task: pictogram}}", "unknown task 'pictogram'"),
        ("same_as: table1/nothing", "there is no nothing.yaml"),
        ("training: {distill_weight: 0.5}", "a teacher is needed"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(study: Path, text: str, message: str) -> None:
    """Found after the rows before it were trained, a slip would cost a night."""
    (study / "experiments/table1/htc.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_and_eval.run(arguments(study, "table1/upper", "table1/htc"))
    assert not (study / "results").exists() and not (study / "work/table1").exists()


def test_the_time_limit_stops_and_the_next_start_ends_with_the_same_numbers(study: Path, capsys: Any) -> None:
    """A limit that loses the work, or changes the result, would be of no use."""
    assert train_and_eval.run(arguments(study, "table1/voco", more=("--time-limit", "0.0001"))) == train_and_eval.EXIT_LEFT
    assert "0 built, 0 failed, 1 left" in capsys.readouterr().out
    assert train_and_eval.run(arguments(study, "table1/voco")) == 0


def test_killed_and_started_again_it_gives_the_same_answers(study: Path) -> None:
    """A kill in the middle of training must cost time, not truth."""
    train_and_eval.run(arguments(study, "table1/voco", more=("--set", "training.steps=6")))
    whole = result(study, "table1/voco")
    other = arguments(study, "table1/voco", more=("--set", "training.steps=6"))
    other = [str(study / "again") if word == str(study / "work") else word for word in other]
    other = [str(study / "results-again") if word == str(study / "results") else word for word in other]
    target = "htc_vlm.train.loop:StageTrainer.compute_loss"
    processes.killed_at(target, 4, train_and_eval.CHILD, "train-and-eval", *other)
    train = study / "again/table1/voco/0/train"
    assert not (study / "results-again/table1/voco/0.json").exists()
    assert train_and_eval.run(other) == 0
    again = json.loads((study / "results-again/table1/voco/0.json").read_text())
    assert again["recipe"] == whole["recipe"] and again["answers"] == whole["answers"]
    assert json.loads((train / "report.json").read_text())["resumed_from"] == "checkpoint-3"


def test_runs_side_by_side_give_the_same_and_report_a_failure(study: Path, capsys: Any) -> None:
    """Processes that share caches: the last to create one must not empty it for the others."""
    write(study, "table1/broken", {"compressor": {"name": "voco"}, "data": [{"task": "pictograms", "images": 200_000}]})
    names = ("table1/voco", "table1/upper", "table1/broken")
    code = train_and_eval.run(arguments(study, *names, more=("--parallel", "2", "--cache", str(study / "cache"))))
    said = capsys.readouterr()
    assert code == train_and_eval.EXIT_FAILED and "2 built, 1 failed, 0 left" in said.out
    assert "200000 images asked for" in said.err
    alone = result(study, "table1/voco")["answers"]
    (study / "results/table1/voco/0.json").rename(study / "kept.json")
    (study / "work/table1/voco/0").rename(study / "kept")
    assert train_and_eval.run(arguments(study, "table1/voco")) == 0
    assert result(study, "table1/voco")["answers"] == alone


def test_seeds_and_options_are_checked() -> None:
    """Prevents a traceback, or seed 0 for everything that is not a number."""
    with pytest.raises(ValueError, match="whole numbers by commas"):
        train_and_eval.seeds_of("0;1")
    with pytest.raises(ValueError, match="defines no row"):
        train_and_eval.wanted_runs([Path("study/experiments/defaults.yaml")], [0], [])
    with pytest.raises(ValueError, match="--parallel is 0"):
        train_and_eval.run(["study/experiments/table1/htc.yaml", "--parallel", "0"])


@pytest.mark.gpu
def test_a_row_runs_on_a_gpu(study: Path) -> None:
    """Features, codes, training and answers all move to the device; one that stays behind is an error there."""
    more = ("--device", "cuda", "--cache", str(study / "cache"))
    assert train_and_eval.run(arguments(study, "table1/htc", "table2/fastv", more=more)) == 0
    assert result(study, "table1/htc")["device"] != "cpu" and result(study, "table2/fastv")["schedule"] == [4, 2]


def fast_row(study: Path, **more: Any) -> None:
    """experiments/long/voco.yaml, trained by the fast trainer with settings of a file."""
    tiny_runs.tower()
    parts = [{"task": "pictograms", "images": 8, "images_per_step": 2, "n_text": 40, "n_answers": 12}]
    watch = {"seen": {"task": "pictograms", "split": "val", "images": 2}}
    settings = {"data": parts, "steps": 2, "compile": False, "measure_every": 1, "watch": watch}
    file = study / "rows.yaml"
    file.write_text(yaml.safe_dump(settings))
    write(study, "long/voco", {"title": "VoCo", "run": str(file), "compressor": {"name": "voco"}, **more})


def test_a_row_of_the_fast_trainer_is_evaluated_as_the_others(study: Path) -> None:
    """With other questions or scores its numbers could not stand beside theirs. What is finished is not trained anew."""
    fast_row(study)
    assert train_and_eval.run(arguments(study, "long/voco", "table1/voco")) == 0
    fast, plain = result(study, "long/voco"), result(study, "table1/voco")
    assert set(fast) == set(plain) and fast["config"]["tasks"] == plain["config"]["tasks"]
    assert {name: one["questions_sha256"] for name, one in fast["answers"].items()} == {
        name: one["questions_sha256"] for name, one in plain["answers"].items()
    }
    assert fast["training"]["steps"] == 2 and fast["config"]["training"]["run"] == "rows" and fast["seed"] == 0
    state = study / "work" / "long" / "voco" / "0" / "train" / "state.pt"
    made = state.stat().st_mtime_ns
    (study / "results" / "long" / "voco" / "0.json").unlink()
    assert train_and_eval.run(arguments(study, "long/voco")) == 0 and state.stat().st_mtime_ns == made


def test_the_record_of_a_fast_row_becomes_a_learning_curve(study: Path) -> None:
    """Two steps, measured after each; a plot over rows is drawn from the files beside the results."""
    from study.curves import draw_curves, equal_time, records
    from study.study_tables import load_table

    fast_row(study)
    train_and_eval.run(arguments(study, "long/voco"))
    tables = {"long": {"title": "Long", "rows": ["voco"], "columns": {"main": ["scenes/*"]}}}
    (study / "experiments" / "tables.yaml").write_text(yaml.safe_dump(tables))
    table = load_table("long", study / "experiments", study / "results")
    ((step, scores), last), *_ = records(table)["VoCo"]
    assert step == 1 and set(scores) == {"seen"} and last[0] == 2 and len(table.rows[0].results) == 1
    draw_curves(table, study / "curves.png")
    assert (study / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(equal_time(table)) == 1  # nothing was timed yet
    output = study / "results" / "long" / "step_time.json"
    more = ["--output", str(output), "--steps", "2", "--cache", str(tiny_runs.cache()), "--work", str(study / "work")]
    assert step_time.run([str(study / "experiments" / "long" / "voco.yaml"), *more]) == 0
    timed = json.loads(output.read_text())
    assert timed["rows"]["voco"]["ratio"] == 1.0 and len(timed["seconds"]["voco"]) == 2
    assert equal_time(table)[1][:3] == ["VoCo", "1.00", "2"]
    slower = {"voco": {"median_s": 0.08539}, "other": {"median_s": 0.08539 * 1.5}}
    output.write_text(json.dumps({"rows": slower, "ratio_to": "voco"}))
    other = replace(table.rows[0], title="Other", name="other")
    record = study / "results" / "long" / "voco" / "0.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    more = [{**row, "right": {"elsewhere": row["right"]["seen"]}} if "right" in row else row for row in rows]
    (study / "results" / "long" / "watched").mkdir()
    (study / "results" / "long" / "watched" / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    elsewhere = replace(table.rows[0], title="Watched", source="long/watched")
    heads, *lines = equal_time(replace(table, rows=(*table.rows, elsewhere)))
    assert heads[3:5] == ["seen", "elsewhere"]
    assert [[bool(cell) for cell in row[3:5]] for row in lines] == [[True, False], [False, True]]
    third = replace(table.rows[0], title="Third", name="third")
    _, first, *others = equal_time(replace(table, rows=(*table.rows, other, third)))
    assert first[:3] == ["VoCo", "1.00", "2"]
    assert [row[:3] for row in others] == [["Other", "1.50", "1"], ["Third", "not timed", ""]]  # 2 / 1.5 steps


def test_an_adapter_row_is_evaluated_on_its_stock_base(study: Path) -> None:
    """Its run leaves no model: the row is `start` with the adapter, whose weights the base does not share."""
    more = {"compressor": {"name": "readers", "n_readers": 2}, "training": {"lora": {"rank": 2}, "turn_loss": 0.5}}
    fast_row(study, **more)
    assert train_and_eval.run(arguments(study, "long/voco")) == 0
    trained = study / "work" / "long" / "voco" / "0" / "train"
    assert (trained / "adapter" / "adapter.json").is_file() and not (trained / "model").exists()
    found = result(study, "long/voco")
    assert found["cached_tokens"] == 1 and found["config"]["training"]["settings"]["lora"] == {"rank": 2}


def test_a_row_without_the_fast_trainer_has_no_step_to_time(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timed as if it had one, it would be another training than the row's. Bounds among a table's rows are passed over."""
    with pytest.raises(ValueError, match="that the fast trainer trains"):
        step_time.run([str(study / "experiments" / "table1" / "voco.yaml"), "--output", str(tmp_path / "x.json")])
    assert "table1/voco" in capsys.readouterr().out


def test_a_row_that_names_two_trainers_is_refused(study: Path) -> None:
    """One of the two would be left out without a word."""
    fast_row(study, stage="compress")
    with pytest.raises(ValueError, match="give one of them"):
        train_and_eval.run(arguments(study, "long/voco"))
