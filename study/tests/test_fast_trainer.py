"""The fast trainer: the library's numbers, questions as trees, as many yes as no, exact resume, a checkpoint that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import htc_vlm
from htc_vlm.model import adapter
from htc_vlm.model.add_compressor import with_compressor
from htc_vlm.model.loading import find
from study.cli import train_tiny
from study.fast_trainer import ship, state
from study.fast_trainer.data import cells_of_patches
from study.fast_trainer.model import method_of
from study.fast_trainer.questions import Pool, encode, paired, questions_of
from study.fast_trainer.settings import Run, make_run, read_run
from study.fast_trainer.tree import END, NOTHING, Asked, grow
from study.fast_trainer.weights import fast_model, library_weights
from study.jobs import quantizer_of
from tests import tiny_runs

TEXTS = ("what is at the top left ?", "what is at the top right ?", "is there a cat ?", "where is the tile in red ?")
CODE = {"preset": "tiny", "image_size": 160}
METHODS: list[dict[str, Any]] = [
    {"name": "none"},
    {"name": "avg_pool", "n_tokens": 4},
    {"name": "voco"},
    {"name": "voco", "n_bottleneck": 2, "visual_attention": "self"},
    {"name": "readers", "n_readers": 8, "n_looks": 1},
    {"name": "readers", "n_readers": 8, "n_looks": 2},
    {"name": "readers", "n_readers": 4, "n_looks": 2, "n_bottleneck": 2, "visual_attention": "self"},
    {"name": "htc", "quantizer": CODE},
    {"name": "htc", "visual_attention": "causal", "quantizer": CODE},
    {"name": "readers", "n_readers": 8, "channels": "hybrid", "quantizer": CODE},
]


def asked_of(tokenizer: Any, texts: tuple[str, ...] = TEXTS) -> list[Asked]:
    return [Asked(tuple(tokenizer.encode(text, add_special_tokens=False)), 7, "name") for text in texts]


def real_size(compressor: dict[str, Any], work: Path) -> tuple[Any, Any]:
    """tiny-upper's weights with a compressor whose own weights are far from zero."""
    mgvq = quantizer_of("tiny-htc", work) if "quantizer" in compressor else None
    torch.manual_seed(0)
    model, processor = with_compressor(find("tiny-upper"), compressor, mgvq, dtype=torch.float32)
    for name, weight in model.model.compressor.named_parameters():
        if not name.startswith("quantizer"):
            weight.data.mul_(3)
    return model.eval(), processor


def image_of(model: Any, n: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    width = model.model.multi_modal_projector.linear_1.in_features
    images = {"patch_features": torch.randn(n, 36, width)}
    if getattr(model.model.compressor, "has_code", False):
        images["image_codes"] = torch.randn(n, 10, 10, 16)
    return images


@torch.no_grad()
def fast_logits(model: Any, images: dict[str, torch.Tensor], trees: Any) -> torch.Tensor:
    fast = fast_model(model)
    code = images["image_codes"].flatten(1) if "image_codes" in images else torch.zeros(1)
    inputs = (trees.ids, trees.depth, trees.visible, trees.at)
    logits, _ = fast(images["patch_features"], code, *inputs, fast.method.n_entries)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("compressor", METHODS, ids=lambda one: "-".join(str(value) for value in one.values() if value != CODE))
def test_logits_are_the_library_s_at_every_answer(compressor: dict[str, Any], tmp_path: Path) -> None:
    """A second implementation that drifts from the first trains another model than the one that is shipped."""
    model, processor = real_size(compressor, tmp_path)
    images = image_of(model)
    asked = asked_of(processor.tokenizer)
    trees = grow([asked, asked[::-1]], n_text=30, n_answers=5, end_id=1)
    fast = fast_logits(model, images, trees)
    built = model.model.compressor
    n_image = [model.config.image_token_id] * built.n_visual(36) + [model.config.bottleneck_token_id] * built.n_bottleneck
    for row, questions in enumerate((asked, asked[::-1])):
        one = {name: value[row : row + 1] for name, value in images.items()}
        for place, question in enumerate(questions):
            ids = torch.tensor([[*n_image, *question.tokens]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **one).logits[0, -1]
            torch.testing.assert_close(fast[row, place], logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("n_looks", [1, 2])
def test_an_adapter_acts_while_the_image_is_read_and_the_text_runs_through_the_base(n_looks: int, tmp_path: Path) -> None:
    """Against the library's adapter, whose own tests hold its base's logits equal; the base itself answers otherwise."""
    model, processor = real_size({"name": "readers", "n_readers": 8, "n_looks": n_looks}, tmp_path)
    images = image_of(model, n=1)
    trees = grow([asked_of(processor.tokenizer)], n_text=30, n_answers=5, end_id=1)
    plain = fast_logits(model, images, trees)
    adapter.add(model, adapter.LoraSettings(rank=4, alpha=8))
    for name, weight in model.named_parameters():
        if adapter.is_adapter_weight(name):
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 10
    fast = fast_logits(model, images, trees)
    assert (fast - plain).abs().max() > 0.1
    for place, question in enumerate(asked_of(processor.tokenizer)):
        ids = torch.tensor([[*[model.config.image_token_id] * 36, model.config.bottleneck_token_id, *question.tokens]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0, -1]
        torch.testing.assert_close(fast[0, place], logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_question_in_a_tree_is_answered_as_if_asked_alone() -> None:
    """Nodes that saw another question's words would teach answers that nobody can give."""
    model, processor = tiny_runs.loaded(tiny_runs.VOCO)
    torch.manual_seed(2)
    images = {"patch_features": torch.randn(1, 4, model.model.multi_modal_projector.linear_1.in_features)}
    asked = asked_of(processor.tokenizer)
    together = fast_logits(model, images, grow([asked], 40, 8, end_id=1, end_every=2))
    kinds = grow([asked], 40, 8, end_id=1, end_every=2).kinds[0]
    places = [place for place, kind in enumerate(kinds) if kind != END]
    for place, question in zip(places, asked, strict=True):
        alone = fast_logits(model, images, grow([[question]], 12, 1, end_id=1))
        torch.testing.assert_close(together[0, place], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_equal_beginnings_stand_once_and_what_does_not_fit_is_left_out() -> None:
    """By hand: 6 + 1 + 4 nodes; the fourth question begins with another word and finds no room."""
    rows = [Asked(tuple(tokens), 9, "name") for tokens in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [8, 1, 2, 3], [2, 3])]
    trees = grow([rows], n_text=12, n_answers=4, end_id=0)
    assert trees.at[0, :3].tolist() == [5, 6, 10] and trees.target[0].tolist() == [9, 9, 9, NOTHING]
    assert trees.depth[0].tolist() == [0, 1, 2, 3, 4, 5, 5, 0, 1, 2, 3, 0] and trees.n_answers == 3


def test_the_end_follows_an_answer_that_stands_in_the_tree() -> None:
    """An answer whose end is never taught goes on for ever."""
    trees = grow([[Asked((4, 5), 6, "name"), Asked((4, 7), 8, "name")]], 8, 4, end_id=1, end_every=8)
    assert trees.kinds == [["name", END, "name"]]
    assert trees.ids[0, :4].tolist() == [4, 5, 6, 7] and trees.target[0].tolist() == [6, 1, 8, NOTHING]
    assert trees.visible[0, 0, 2].nonzero().flatten().tolist() == [0, 1, 2]


def pool_of(questions: list[tuple[str, str, str]]) -> tuple[Pool, Any]:
    from htc_vlm.tiny.questions import Question

    tokenizer = tiny_runs.loaded(tiny_runs.NONE)[1].tokenizer
    return encode([[Question("q", "i", text, answer, kind) for text, answer, kind in questions]], tokenizer), tokenizer


def test_yes_and_no_are_drawn_equally_often_about_every_picture() -> None:
    """Of a picture's different questions four of five are answered no; asked as they came, readers learned to say no."""
    tokenizer = tiny_runs.loaded(tiny_runs.NONE)[1].tokenizer
    ids = [f"train/{number}" for number in range(6)]
    pool = encode([questions_of("pictograms", image_id) for image_id in ids], tokenizer)
    yes, no = pool.yes_no
    exist = pool.kinds.index("exist")
    assert (pool.answer[pool.kind == exist] == yes).mean() < 0.5  # there are more to say no to
    for picture in range(len(ids)):
        rng = np.random.default_rng(picture)
        answers = [one.answer for one in pool.draw(picture, {"exist": 1.0, "name": 0.1}, rng) if one.kind == "exist"]
        assert answers.count(yes) == answers.count(no) >= 2


def test_only_questions_answered_yes_or_no_are_paired() -> None:
    """A "no" that is one of three answers has no partner."""
    answer, kind = np.array([5, 6, 6, 7, 5, 6, 6]), np.array([0, 0, 0, 0, 1, 1, 1])
    kept = paired(np.arange(7), answer, kind, (5, 6), np.random.default_rng(0))
    assert kept[:4].tolist() == [0, 1, 2, 3] and len(kept) == 6 and 4 in kept


def test_a_kind_of_weight_zero_comes_last() -> None:
    """The mixture says what is asked first; what does not fit into the tree is not asked."""
    rows = [("what is at the top left ?", "cat", "name"), ("where is the cat ?", "top-left", "where")]
    pool, _ = pool_of(rows)
    kinds = {pool.draw(0, {"where": 1.0, "name": 0.0}, np.random.default_rng(seed))[0].kind for seed in range(20)}
    assert kinds == {"where"}


def test_an_answer_of_two_words_is_refused() -> None:
    """The answer is read off one node; half an answer would be trained."""
    with pytest.raises(ValueError, match="more than one token"):
        pool_of([("what is at the top left ?", "top left", "name")])


# ------------------------------------------------------------------------------------------------ runs
def settings(compressor: dict[str, Any], **other: Any) -> dict[str, Any]:
    parts = [{"task": "pictograms", "images": 8, "images_per_step": 2, "n_text": 40, "n_answers": 12}]
    watch = {"seen": {"task": "pictograms", "split": "val", "images": 2}}
    return {
        "compressor": compressor, "start": str(tiny_runs.checkpoint(tiny_runs.NONE)), "mgvq": str(tiny_runs.quantizer()),
        "data": parts, "steps": 6, "save_every": 2, "log_every": 2, "measure_every": 3, "compile": False, "turn_loss": 0.5,
        "learning_rate": 1e-2, "warmup_steps": 1, "watch": watch, "loss_weights": {"exist": 2.0, "end": 0.3}, **other,
    }  # fmt: skip


def train(folder: Path, given: dict[str, Any], *more: str) -> int:
    tiny_runs.tower()
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(given))
    return train_tiny.run([str(file), "--out", str(folder), "--cache", str(tiny_runs.cache()), *more])


def same(first: Path, second: Path) -> bool:
    one, other = state.read(first), state.read(second)
    weights = all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    moments = [[s["exp_avg"] for s in x["optimizer"]["state"].values()] for x in (one, other)]
    return weights and all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, the record included; killed after a state was written and some more steps were made."""
    given = settings({"name": "readers", "n_readers": 2, "n_looks": 2, "n_bottleneck": 2, "elastic": True})
    assert train(tmp_path / "whole", given) == 0
    steps = iter(range(100))

    def cut(*args: Any) -> Any:
        if next(steps) == 5:
            raise KeyboardInterrupt
        return real(*args)

    from study.fast_trainer import train as trainer

    real = trainer.keep_record
    monkeypatch.setattr(trainer, "keep_record", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", given)
    monkeypatch.setattr(trainer, "keep_record", real)
    assert state.read(tmp_path / "cut")["step"] == 4
    with pytest.raises(ValueError, match="--resume"):
        train(tmp_path / "cut", given)
    assert train(tmp_path / "cut", given, "--resume") == 0
    assert same(tmp_path / "whole", tmp_path / "cut")
    rows = [state.record(tmp_path / name) for name in ("whole", "cut")]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [2, 3, 4, 6, 6]


def test_other_settings_are_refused_and_more_frequent_saving_is_not(tmp_path: Path) -> None:
    """A run whose learning rate changed on the way is none that its report describes."""
    given = settings({"name": "voco"}, watch={}, turn_loss=0.0)
    train(tmp_path / "run", given)
    with pytest.raises(ValueError, match="learning_rate was 0.01, is 0.02"):
        train(tmp_path / "run", {**given, "learning_rate": 0.02}, "--resume")
    assert train(tmp_path / "run", {**given, "save_every": 1}, "--resume") == 0


@pytest.mark.parametrize("compressor", [{"name": "readers", "n_readers": 2}, tiny_runs.HTC], ids=["readers", "htc"])
def test_the_checkpoint_holds_what_was_trained_and_loads(compressor: dict[str, Any], tmp_path: Path) -> None:
    """Rounded to bfloat16, under the library's names; the frozen tower and the quantizer as they were."""
    train(tmp_path / "run", settings(compressor, steps=2))
    model, processor = htc_vlm.load(tmp_path / "run" / "model")
    start, _ = htc_vlm.load(tiny_runs.checkpoint(tiny_runs.NONE))
    trained = state.read(tmp_path / "run")["model"]
    loaded, before = model.state_dict(), start.state_dict()
    fast = fast_model(model, reads_turn=True)
    fast.load_state_dict(trained)
    for name, value in library_weights(fast).items():
        assert torch.equal(loaded[name], value.bfloat16().float()), name
        assert name not in before or not torch.equal(loaded[name], before[name]), name
    tower = [name for name in before if name.startswith("model.vision_tower") and before[name].is_floating_point()]
    assert tower and all(torch.equal(loaded[name], before[name].bfloat16().float()) for name in tower)
    report = yaml.safe_load((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 2 and set(report["right"]["seen"]) > {"score", "exist"}
    assert (tmp_path / "run" / "loss.png").is_file() and processor.tokenizer is not None


def test_an_adapter_learns_and_its_base_does_not(tmp_path: Path) -> None:
    """Its folder goes onto the stock base; only the adapter, the rows and the head for turns had a gradient."""
    given = settings({"name": "readers", "n_readers": 2}, steps=3, lora={"rank": 2, "alpha": 4})
    assert train(tmp_path / "run", given) == 0
    base, _ = htc_vlm.load(given["start"])
    model, _ = htc_vlm.load(given["start"], adapter=tmp_path / "run" / "adapter")
    trained, kept = state.read(tmp_path / "run")["model"], model.state_dict()
    down = kept["model.language_model.layers.1.mlp.down_proj.lora_B.image_reader.weight"]
    assert torch.equal(down, trained["lora.1.down_proj_b"])
    assert all(trained[f"lora.{i}.{m}_b"].abs().max() > 0 for i in (0, 1) for m in ("k_proj", "v_proj"))
    for name, value in base.state_dict().items():
        assert torch.equal(kept[name if name in kept else name.replace(".weight", ".base_layer.weight")], value), name
    assert train(tmp_path / "run", given, "--resume") == 0
    with pytest.raises(ValueError, match="no checkpoint of its own"):
        ship.export_state(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="one pass with the text"):
        train(tmp_path / "voco", {**given, "compressor": {"name": "voco"}})
    for i, (wrong, message) in enumerate((
        ({"lora": {"rnk": 2}}, "lora: .*rnk"), ({"lora": {"dropout": 0.1}}, "lora: dropout is 0.1"),
        ({"lora": {"modules": ["q_proj"]}}, "lora: modules is"), ({"start": None}, "give `start`"),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(tmp_path / f"wrong-{i}", {**given, **wrong})


def test_pooled_patches_have_no_turns_to_read(tmp_path: Path) -> None:
    """The second loss asks each patch; a pooled token has no place."""
    given = settings({"name": "avg_pool"}, steps=2)
    with pytest.raises(ValueError, match="turn_loss: 0"):
        train(tmp_path / "run", given)
    assert train(tmp_path / "other", {**given, "turn_loss": 0.0}) == 0


def test_a_new_model_is_trained_without_a_start(tmp_path: Path) -> None:
    """The upper bound from scratch, by the preset named."""
    preset = tiny_runs.write_preset(tmp_path)
    given = settings({"name": "none"}, start=None, preset=str(preset), steps=2)
    assert train(tmp_path / "run", given) == 0
    assert htc_vlm.load(tmp_path / "run" / "model")[0].config.compressor["name"] == "none"
    with pytest.raises(ValueError, match="give `start`"):
        train(tmp_path / "voco", {**given, "compressor": {"name": "voco"}})


def test_the_turn_of_a_thing_is_asked_of_its_own_quarter() -> None:
    """By hand, 6 x 6 patches: the first row has three patches of the left and three of the right."""
    assert cells_of_patches(36).view(6, 6)[[0, 2, 3, 5]].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2


@pytest.mark.parametrize(
    "compressor", [{"name": "qformer"}, {**tiny_runs.HTC, "fusion": "mean"}, {"name": "voco", "positions": "compact"}]
)
def test_methods_that_the_fast_model_does_not_have_are_refused(compressor: dict[str, Any]) -> None:
    """Trained as something else, they would be shipped under a wrong name."""
    with pytest.raises(ValueError, match="htc-vlm train"):
        method_of(compressor)


def test_every_run_of_the_repository_can_be_read() -> None:
    """A slip in a committed YAML would be found by whoever wants to reproduce a model."""
    from study.fast_trainer.settings import SETS

    runs = {file.stem: read_run(file) for file in sorted(SETS.glob("*.yaml"))}
    assert {"tiny", "tiny-upper"} <= set(runs)
    for run in runs.values():
        method_of(run.compressor)
        assert not run.mixtures or run.mixtures[-1]["until"] == 1
    assert runs["tiny"].compressor == {"name": "readers", "n_readers": 8, "n_looks": 2} and len(runs["tiny"].parts) == 3
    with pytest.raises(ValueError, match="unknown"):
        make_run({"data": [{"task": "pictograms", "images": 1, "pictures": 2}]}, "here")
    assert isinstance(runs["tiny"], Run)


def test_shipping_collects_the_tests_and_those_of_the_lower_bound() -> None:
    """The lower bound is the upper bound's weights; a new upper bound beside an old lower one would measure nothing."""
    from study.fast_trainer import ship

    assert [kept for kept, *_ in ship.evaluations("tiny", [0, 2])] == ["tiny", "tiny"]
    both = ship.evaluations("tiny-upper", [1, 3])
    assert [kept for kept, *_ in both] == ["tiny-upper", "tiny-lower", "tiny-upper"]
    assert both[1][2] == ("--split", "test-unseen", "--compressor", "voco")


def test_shipping_writes_checkpoint_and_record_without_this_machine_s_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed names nobody's folders."""
    from study.cli import ship_tiny
    from study.fast_trainer import ship

    monkeypatch.setattr(ship, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(ship, "RESULTS", tmp_path / "results")
    train(tmp_path / "run", settings({"name": "voco"}, steps=2, watch={}, turn_loss=0.0))
    assert ship_tiny.run(["small", "--run", str(tmp_path / "run")]) == 0
    assert htc_vlm.load(tmp_path / "checkpoints" / "small")[0].config.compressor["name"] == "voco"
    record = tmp_path / "results" / "small" / "training"
    assert sorted(file.name for file in record.iterdir()) == ["loss.png", "metrics.jsonl", "report.json"]
    assert str(tiny_runs.root()) not in (record / "report.json").read_text()
    with pytest.raises(ValueError, match="no 4"):
        ship_tiny.run(["small", "--evaluate", "--tests", "4"])


def test_the_first_entries_of_an_elastic_run_are_a_model_of_their_own(tmp_path: Path) -> None:
    """A model of one entry costs one entry's bytes, and says what the elastic one says with `n_entries=1`."""
    from study.fast_trainer.ship import export_state

    elastic = {"name": "readers", "n_readers": 2, "n_bottleneck": 4, "elastic": True}
    train(tmp_path / "run", settings(elastic, steps=2, watch={}, turn_loss=0.0))
    whole, _ = htc_vlm.load(tmp_path / "run" / "model")
    export_state(tmp_path / "run", tmp_path / "cut", n_entries=2)
    cut, processor = htc_vlm.load(tmp_path / "cut")
    assert (cut.config.compressor["n_bottleneck"], cut.config.compressor["elastic"], processor.n_bottleneck) == (2, True, 2)
    torch.manual_seed(1)
    features = torch.randn(2, 4, whole.model.multi_modal_projector.linear_1.in_features)
    for n_entries in (1, 2):
        cells = [model.compress(patch_features=features, n_entries=n_entries) for model in (whole, cut)]
        torch.testing.assert_close(cells[0].kv, cells[1].kv, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="--entries is 3; this run was trained with 1, 2, 4"):
        export_state(tmp_path / "run", tmp_path / "none", n_entries=3)
