"""`htc-vlm ask`: answers from cells, costs, files of cells, and one clear line for everything that cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from htc_vlm.cli import ask
from htc_vlm.cli._toys import tell_toy
from htc_vlm.model.compressed import CompressedImages
from htc_vlm_cli import main

from .. import tiny_runs as tiny

Capture = pytest.CaptureFixture[str]
MODEL = ["--model", str(tiny.root() / "htc")]


@pytest.fixture(autouse=True, scope="module")
def model() -> None:
    """MODEL names a checkpoint with anchors."""
    link = tiny.root() / "htc"
    if not link.exists():
        link.symlink_to(tiny.checkpoint(tiny.HTC))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    tiny.noise(7).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


def asked(capsys: Capture, *words: str) -> tuple[int, str, list[str]]:
    """(exit code, stdout, our own lines on stderr) of one command."""
    capsys.readouterr()
    code = main(["ask", *words, "--max-new-tokens", "3"])
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("htc-vlm")]


def answers(out: str) -> list[list[str]]:
    """By picture, from --json."""
    return [[item["answer"] for item in row["answers"]] for row in json.loads(out)["pictures"]]


# ------------------------------------------------------------------------------------------------ refusals
def test_what_is_missing_is_said(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """Nothing at all, only a question, only a picture, an empty question, a folder that is not there."""
    cases = {
        (): "no picture given; e.g. htc-vlm ask cat.png",
        ("what is it ?",): "no picture given",
        (picture,): "no question given",
        (picture, " "): "an empty question",
        (picture, "what ?", "--save", str(tmp_path / "no" / "x.st")): "its folder does not exist; create it first",
        (picture, "what ?", "--heatmap", str(tmp_path / "no" / "x.png")): "its folder does not exist; create it first",
        (picture, "what ?", "--from", "x.st"): "give pictures or --from FILE, not both",
        ("--from", "x.st", "what ?", "--heatmap", "x.png"): "--heatmap needs the picture itself",
        ("--from", "x.st", "what ?", "--verbose"): "needs the picture itself",
        (picture, "what ?", "--model", "no-such-model"): "no shipped checkpoint of that name; shipped: ",
        (picture, "what ?", "--model", str(tmp_path)): "holds no checkpoint",
        (picture, "caf\udce9 ?"): "a question: 'caf\\udce9 ?' is no Unicode text",
    }
    for words, message in cases.items():
        code, out, lines = asked(capsys, *words)
        assert (code, out, len(lines)) == (2, "", 1) and message in lines[0], (words, lines)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder; give the picture files in it"),
        ("missing.png", "no such file; check the path"),
        ("text.png", "is not a picture"),
        ("notes.txt", "is not a picture"),
    ],
)
def test_what_is_no_picture_is_said(name: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    """Also with --json, which is valid JSON even then."""
    (tmp_path / "folder").mkdir()
    for text in ("text.png", "notes.txt"):
        (tmp_path / text).write_text("this is text")
    code, out, lines = asked(capsys, str(tmp_path / name), "what is it ?", *MODEL)
    assert (code, out, len(lines)) == (2, "", 1) and message in lines[0] and name in lines[0]
    code, out, lines = asked(capsys, str(tmp_path / name), "what is it ?", *MODEL, "--json")
    report = json.loads(out)
    assert (code, report["pictures"], [row["picture"] for row in report["refused"]]) == (2, [], [str(tmp_path / name)])


def test_no_tokens_are_not_an_answer(picture: str, capsys: Capture) -> None:
    """0 new tokens is refused before a model is loaded."""
    assert main(["ask", picture, "what ?", "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens is 0; give at least 1" in capsys.readouterr().err


def test_a_long_question_is_a_question() -> None:
    """The system refuses to look for a file whose name is longer than 255 bytes: it was an error about file names."""
    question = "is there a cat ? " * 40
    assert ask.sort_words([question, ""]) == ask.Request([], [question, ""])


def test_a_hostile_folder_loses_nothing(tmp_path: Path, capsys: Capture) -> None:
    """Every bad file is named, every good one answered, exit code 1: partly done."""
    files = sorted(str(path) for path in tiny.hostile_folder(tmp_path / "wild").iterdir())
    code, out, lines = asked(capsys, *files, *tiny.QUESTIONS, *MODEL, "--json")
    report = json.loads(out)
    assert code == 1 and len(lines) == len(tiny.BAD)
    assert sorted(Path(row["picture"]).name for row in report["pictures"]) == sorted(tiny.GOOD)
    assert sorted(Path(row["picture"]).name for row in report["refused"]) == sorted(tiny.BAD)
    assert all([item["question"] for item in row["answers"]] == tiny.QUESTIONS for row in report["pictures"])


# ------------------------------------------------------------------------------------------------ answers
def test_answers_are_those_of_the_model(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """Two pictures, two questions: each answer as the model gives it for that picture and that question alone."""
    tiny.noise(8, (20, 60)).save(tmp_path / "dog.png")
    code, out, _ = asked(capsys, picture, *tiny.QUESTIONS, str(tmp_path / "dog.png"), *MODEL, "--json")
    model, processor = tiny.loaded(tiny.HTC)
    expected = []
    for path in (picture, tmp_path / "dog.png"):
        row = []
        for question in tiny.QUESTIONS:
            inputs = processor(images=[Image.open(path)], text=f"<image>{question} ", return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            row.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        expected.append(row)
    assert (code, answers(out)) == (0, expected)


def test_saved_cells_answer_as_the_pictures_do(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """The whole point: asked again without the picture."""
    tiny.noise(9).save(tmp_path / "b.png")
    file = str(tmp_path / "cells.safetensors")
    code, before, _ = asked(capsys, picture, str(tmp_path / "b.png"), *tiny.QUESTIONS, *MODEL, "--json", "--save", file)
    again, after, _ = asked(capsys, "--from", file, *tiny.QUESTIONS, *MODEL, "--json")
    assert (code, again) == (0, 0) and answers(after) == answers(before)
    assert [row["picture"] for row in json.loads(after)["pictures"]] == ["cells.safetensors[0]", "cells.safetensors[1]"]


def test_foreign_and_damaged_cells_are_refused(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """Cells of other weights give fluent nonsense."""
    good = tmp_path / "cells.st"
    assert asked(capsys, picture, *MODEL, "--save", str(good))[0] == 0
    damaged = bytearray(good.read_bytes())
    (tmp_path / "cut.st").write_bytes(damaged[:-10])
    (tmp_path / "text.st").write_text("no cells")
    CompressedImages(CompressedImages.load(good).kv, "0" * 16, 6).save(tmp_path / "foreign.st")
    cases = {
        "cut.st": "damaged file", "text.st": "damaged file", "none.st": "no such file",
        "foreign.st": "compressed by another model",
    }  # fmt: skip
    for name, message in cases.items():
        code, out, lines = asked(capsys, "--from", str(tmp_path / name), tiny.QUESTIONS[0], *MODEL)
        assert (code, out, len(lines)) == (2, "", 1) and message in lines[0], (name, lines)
    code, out, lines = asked(capsys, "--from", str(good), "what ?", "--model", str(tiny.checkpoint(tiny.NONE)))
    assert code == 2 and "has no bottleneck" in lines[-1]


def test_a_heatmap_is_a_picture(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """With and without a question."""
    for words in ((), ("what is it ?",)):
        file = tmp_path / f"map{len(words)}.png"
        assert asked(capsys, picture, *words, *MODEL, "--heatmap", str(file))[0] == 0
        with Image.open(file) as drawn:
            assert drawn.size[0] > drawn.size[1] > 100
            assert len(drawn.convert("RGB").resize((60, 20)).getcolors(1200)) > 20


def test_unknown_words_are_named(picture: str, capsys: Capture) -> None:
    """A word-level tokenizer turns them all into one; the reader must know why the answer makes no sense."""
    code, _, lines = asked(capsys, picture, "is there a zeppelin or a mammal ?", *MODEL)
    assert code == 0 and len(lines) == 1
    assert lines[0].endswith("has never seen the words: zeppelin, or") or lines[0].endswith("words: zeppelin")


def test_a_shipped_toy_says_what_it_knows(
    picture: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tiny` answered about a photo, confidently and wrongly, and only the README said that it knows drawn scenes."""
    note = "htc-vlm ask: tiny knows drawn scenes only"
    code, out, lines = asked(capsys, picture, "what is at the top left ?", "--json")
    assert code == 0 and len(answers(out)) == 1 and [line for line in lines if line.startswith(note)] == lines
    for model in (MODEL[1], "runs/tiny"):
        tell_toy("ask", model)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    tell_toy("ask", "tiny")  # somebody's own folder
    assert capsys.readouterr().err == ""


def test_verbose_counts_tokens_and_bytes(picture: str, capsys: Capture) -> None:
    """K x layers x 2 x kv heads x head_dim x bytes per number; the uncompressed path keeps all P patches instead."""
    _, out, _ = asked(capsys, picture, tiny.QUESTIONS[0], *MODEL, "--json", "--verbose")
    costs = json.loads(out)["pictures"][0]["cost"]
    per_token = tiny.N_LAYERS * 2 * tiny.N_KV_HEADS * tiny.HEAD_DIM * 4  # float32
    numbers = {path: (c["visual_tokens_read"], c["cached_tokens"], c["cache_bytes"]) for path, c in costs.items()}
    n_anchors = tiny.HTC["n_anchors"]
    assert numbers == {
        "compressed": (tiny.N_PATCHES + n_anchors + 1, 1, per_token),
        "uncompressed": (tiny.N_PATCHES, tiny.N_PATCHES, tiny.N_PATCHES * per_token),
    }
    assert all(c[name] > 0 for c in costs.values() for name in ("encode_ms", "first_token_ms", "answer_ms"))
    model, processor = tiny.loaded(tiny.HTC)
    assert model.compress(**processor(images=[tiny.noise(0)], return_tensors="pt")).nbytes == per_token


def test_text_output_holds_the_questions_and_both_costs() -> None:
    """For people."""
    cost = {
        "visual_tokens_read": 105, "cached_tokens": 1, "cache_bytes": 12288, "encode_ms": 9.5, "first_token_ms": 4.0,
        "answer_ms": 5.0,
    }  # fmt: skip
    row = {"picture": "cat.png", "answers": [{"question": "what ?", "answer": "cat"}], "cost": {"compressed": cost}}
    assert ask.as_text({"pictures": [row]}).splitlines() == [
        "cat.png",
        "  what ?  ->  cat",
        "  compressed    reads 105 tokens, keeps 1 (12,288 bytes); encode 9.5 ms, first token 4.0 ms, answer 5.0 ms",
    ]


def test_a_model_without_a_bottleneck_keeps_prefixes_and_draws_no_map(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """The upper bound may be asked, and its pictures kept with all their tokens; --heatmap says that there is no bottleneck."""
    model = ["--model", str(tiny.checkpoint(tiny.NONE))]
    assert asked(capsys, picture, *tiny.QUESTIONS, *model)[0] == 0
    code, out, lines = asked(capsys, picture, "what ?", *model, "--heatmap", str(tmp_path / "x.png"))
    assert (code, out) == (2, "") and "has no bottleneck" in lines[-1]
    assert not (tmp_path / "x.png").exists()
    assert asked(capsys, picture, *model, "--save", str(tmp_path / "kept"))[0] == 0
    code, again, _ = asked(capsys, "--from", str(tmp_path / "kept"), tiny.QUESTIONS[0], *model)
    at_once = asked(capsys, picture, tiny.QUESTIONS[0], *model)[1]
    assert code == 0 and again.split("->")[1] == at_once.split("->")[1]


def test_timing_leaves_random_numbers_alone() -> None:
    """median_ms calls once for warmth and `repeats` times."""
    calls: list[int] = []
    state = torch.get_rng_state()
    assert ask.median_ms(lambda: calls.append(1), 4) >= 0
    assert len(calls) == 5 and torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ batches, methods, devices
def test_no_more_than_a_batch_of_pictures_is_in_memory(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 pictures were decoded and encoded at once: 9.8 GB. Five pictures, two at a time; three pairs were asked at once."""
    from htc_vlm.model.answering import Answerer

    encoded: list[int] = []
    asked_at_once: list[int] = []
    encode, ask_all = Answerer.encode, Answerer.ask

    def count_pictures(self: Answerer, pictures: list[Image.Image]) -> object:
        encoded.append(len(pictures))
        return encode(self, pictures)

    def count_questions(self: Answerer, images: object, which: list[int], *words: object) -> list[str]:
        asked_at_once.append(len(which))
        return ask_all(self, images, which, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(Answerer, "encode", count_pictures)
    monkeypatch.setattr(Answerer, "ask", count_questions)
    files = []
    for i in range(5):
        tiny.noise(i).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    album = str(tmp_path / "album")
    code, together, _ = asked(capsys, *files, *tiny.QUESTIONS, *MODEL, "--json", "--batch-size", "2", "--save", album)
    assert (code, encoded) == (0, [2, 2, 1]) and max(asked_at_once) == 2 and sum(asked_at_once) == 10
    rows = json.loads(together)["pictures"]
    assert [row["picture"] for row in rows] == files
    assert all([item["question"] for item in row["answers"]] == tiny.QUESTIONS for row in rows)
    kept = CompressedImages.load(album)
    torch.testing.assert_close(kept.kv, encode(Answerer(*tiny.loaded(tiny.HTC)), [tiny.noise(i) for i in range(5)]).kv,
                               atol=1e-5, rtol=0)  # type: ignore[union-attr]  # fmt: skip
    again = asked(capsys, "--from", album, tiny.QUESTIONS[0], *MODEL, "--json", "--batch-size", "2")[1]
    assert [row["picture"] for row in json.loads(again)["pictures"]] == [f"album[{i}]" for i in range(5)]


def test_a_method_is_applied_to_an_uncompressed_model(
    picture: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and budget, or with settings: the cache of the last layer holds what is kept of the 4 patches and the text."""
    from htc_vlm.applied import apply as module

    applied: list[tuple[str, dict[str, object]]] = []
    real = module.apply

    def record(model: object, name: str, **settings: object) -> object:
        applied.append((name, settings))
        return real(model, name, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("htc_vlm.apply", record)
    model = ["--model", str(tiny.checkpoint(tiny.NONE))]
    settings = json.dumps({"name": "fastv", "n_keep": 2, "layer": 1})
    assert asked(capsys, picture, tiny.QUESTIONS[0], *model, "--method", settings)[0] == 0
    assert asked(capsys, picture, tiny.QUESTIONS[0], *model, "--method", "divprune", "--budget", "2")[0] == 0
    assert applied == [("fastv", {"n_keep": 2, "layer": 1}), ("divprune", {"n_keep": 2})]


def test_methods_budgets_and_devices_that_cannot_work_are_refused(picture: str, tmp_path: Path, capsys: Capture) -> None:
    """Before anything is computed."""
    none = ["--model", str(tiny.checkpoint(tiny.NONE))]
    cases = {
        ("--method", "fastv", "--save", str(tmp_path / "x")): "fastv chooses by the question",
        ("--method", "fastv", "--verbose"): "--verbose is about a bottleneck",
        ("--budget", "2"): "--budget sets the settings of a --method; name one",
        ("--method", "fastvv"): "fastvv",
        ("--batch-size", "0"): "--batch-size is 0; give at least 1",
        ("--device", "gpu"): "--device 'gpu': no kind of device",
    }
    if not torch.cuda.is_available():
        cases["--device", "cuda"] = "--device cuda: torch finds 0 CUDA devices; cpu always works"
    for words, message in cases.items():
        code, out, lines = asked(capsys, picture, "what ?", *none, *words)
        assert (code, out) == (2, "") and message in lines[-1], (words, lines)
