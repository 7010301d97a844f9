"""The lmms-eval plugin: the same model on the same POPE-style questions answers alike through both harnesses.

All but the first test need lmms-eval (`pip install htc-vlm[lmms]`, see docs/evaluation.md).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from htc_vlm.eval.run import run_task
from htc_vlm.eval.task import SHORT
from htc_vlm.model.answering import Answerer

from . import tiny_runs as tiny

REPO = Path(__file__).resolve().parents[1]
needs_lmms_eval = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
QUESTIONS = ["is there a mammal ?", "is there a bird ?", "what is at the top left ?"]


def test_the_entry_point_names_a_function_that_exists() -> None:
    """A renamed file would make lmms-eval warn and go on without the model. Read, not imported: lmms-eval may be missing."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["htc_vlm"].partition(":")
    tree = ast.parse((REPO / "src" / f"{module.replace('.', '/')}.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {name, "HtcVlm"} <= defined and "lmms" in project["optional-dependencies"]


def pope_files(root: Path) -> list[dict[str, Any]]:
    """Official POPE files about three pictures, three questions each; the rows of the same as lmms-eval's data set."""
    from PIL import Image

    rows, lines = [], []
    (root / "pope" / "val2014").mkdir(parents=True)
    (root / "pope" / "coco").mkdir(parents=True)
    for number in range(9):
        name = f"COCO_val2014_{number // 3:012d}.jpg"
        path = root / "pope" / "val2014" / name
        tiny.noise(number // 3).save(path)
        with Image.open(path) as picture:
            pixels = picture.convert("RGB")
        label = ("yes", "no")[number % 2]
        lines.append({"question_id": number, "image": name, "text": QUESTIONS[number % 3], "label": label})
        rows.append({"question_id": str(number), "question": QUESTIONS[number % 3], "answer": label, "image": pixels})
    (root / "pope" / "coco" / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return rows


def local_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """lmms-eval's own POPE over a parquet file instead of the hub."""
    import datasets  # type: ignore[import-not-found]
    import lmms_eval  # type: ignore[import-not-found]

    built_in = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.to_parquet(folder / "pope.parquet")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(
        f"include: {built_in}\ntask: htc_pope_local\ndataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'pope.parquet'}\n"
        "generation_kwargs:\n  max_new_tokens: 6\n  temperature: 0\n  top_p: 1.0\n  num_beams: 1\n  do_sample: false\n"
    )
    return tasks


@needs_lmms_eval
@pytest.mark.slow
def test_both_harnesses_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another prompt, another resize or another order of images and text would show here, question by question."""
    from lmms_eval.evaluator import simple_evaluate  # type: ignore[import-not-found]
    from lmms_eval.tasks import TaskManager  # type: ignore[import-not-found]

    from htc_vlm.eval.lmms_plugin import HtcVlm
    from htc_vlm.eval.tasks.pope import Pope

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(Pope, "max_new_tokens", 6)
    rows = pope_files(tmp_path)
    tasks = local_task(tmp_path, rows)
    checkpoint = tiny.checkpoint(tiny.HTC)
    run_task(Answerer(*tiny.loaded(tiny.HTC)), "pope", tmp_path / "out", root=tmp_path, split="random")
    lines = (tmp_path / "out" / "pope-random" / "answers.jsonl").read_text().splitlines()
    ours = {json.loads(line)["id"].split("/")[1]: json.loads(line) for line in lines}

    model = HtcVlm(pretrained=str(checkpoint), batch_size=4)
    results = simple_evaluate(
        model=model, tasks=["htc_pope_local"], task_manager=TaskManager(include_path=str(tasks)), batch_size=4,
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    samples = results["samples"]["htc_pope_local"]
    theirs = {str(rows[sample["doc_id"]]["question_id"]): sample["filtered_resps"][0] for sample in samples}
    assert theirs == {number: line["answer"] for number, line in ours.items()} and len(theirs) == 9
    assert ours["0"]["prompt"] == QUESTIONS[0] + SHORT
    assert len(set(theirs.values())) > 1  # one answer to everything would prove little


@needs_lmms_eval
def test_lmms_eval_finds_the_model_by_name() -> None:
    """Through the entry point alone, without LMMS_EVAL_PLUGINS."""
    if "htc_vlm" not in {point.name for point in entry_points(group="lmms_eval.models")}:
        pytest.skip("the installed htc-vlm is older than its entry point; pip install -e . again")
    from lmms_eval.models import get_model  # type: ignore[import-not-found]

    from htc_vlm.eval.lmms_plugin import HtcVlm

    assert get_model("htc_vlm") is HtcVlm and get_model("htc-vlm") is HtcVlm


@needs_lmms_eval
def test_questions_of_one_picture_share_its_cells() -> None:
    """Re-encoding per question is what the cache is there to avoid."""
    from htc_vlm.eval.lmms_plugin import HtcVlm, Question

    model = HtcVlm(pretrained=str(tiny.checkpoint(tiny.HTC)))
    encoded: list[int] = []
    encode = model.answerer.encode
    model.answerer.encode = lambda pictures: encoded.append(len(pictures)) or encode(pictures)  # type: ignore[method-assign]
    pictures = {name: tiny.noise(i) for i, name in enumerate("ab")}
    asked = [Question(name, pictures[name], QUESTIONS[i], 4, ()) for i, name in enumerate("aba")]
    texts = [result.text for result in model._batch(asked)]
    assert encoded == [2]
    alone = [model._batch([one])[0].text for one in asked]
    assert texts == alone


@needs_lmms_eval
def test_what_cannot_be_answered_faithfully_is_refused() -> None:
    """lmms-eval's own adapters log such errors and score an empty answer."""
    from htc_vlm.eval.lmms_plugin import Question, check_greedy, read_messages

    picture = {"type": "image", "url": tiny.noise(0)}
    text = {"type": "text", "text": "what ?"}
    assert read_messages([{"role": "user", "content": [picture, text]}])[1] == "what ?"
    for content in ([text, picture], [text], [picture, picture, text]):
        with pytest.raises(ValueError, match="one picture before the text"):
            read_messages([{"role": "user", "content": content}])
    with pytest.raises(ValueError, match="system"):
        read_messages([{"role": "system", "content": []}, {"role": "user", "content": [picture, text]}])
    check_greedy({"do_sample": False, "temperature": 0, "num_beams": 1, "top_p": 1.0, "max_new_tokens": 5, "until": ["\n"]})
    for wrong in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 5}, {"length_penalty": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_greedy(wrong)
    assert Question("k", picture["url"], "what ?", 5, ("\n\n", ".")).cut("a cat. yes\n\nno") == "a cat"
