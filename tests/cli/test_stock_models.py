"""The commands on a checkpoint of another family: a tiny LLaVA-NeXT with its own processor, saved to a folder."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import htc_vlm
import htc_vlm_cli
from htc_vlm import CompressedImages, ImageStore
from htc_vlm.tiny import pictograms

from .. import tinies

QUESTION = "what is at the top left ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tinies.save_llava_next(tmp_path_factory.mktemp("next"))
    Image.new("RGB", (40, 30), "red").save(path / "a.png")
    (path / "photos").mkdir()
    for number, size in enumerate([(40, 30), (30, 30), (30, 60)]):
        pictograms.picture(f"test/{number}").resize(size).save(path / "photos" / f"{number}.png")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = htc_vlm_cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_pictures_of_any_family_are_kept_and_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--save and --from needed a bottleneck; what is answered from the file is what is answered at once."""
    ask = ("ask", "--model", folder, "--json")
    method = ("--method", "divprune", "--budget", "8")
    code, out, err = run(capsys, *ask, *method, "--save", folder / "kept", folder / "a.png", QUESTION)
    assert code == 0, err
    kept = CompressedImages.load(folder / "kept")
    assert kept.prompt is not None and kept.prompt["method"] == {"name": "divprune", "budget": 8}
    code, again, _ = run(capsys, *ask, "--from", folder / "kept", QUESTION)
    assert code == 0
    first, second = (json.loads(text)["pictures"][0]["answers"] for text in (out, again))
    assert first == second
    code, _, _ = run(capsys, *ask, "--method", '{"name": "fastv", "n_keep": 8, "layer": 1}', folder / "a.png", QUESTION)
    assert code == 0
    code, _, err = run(capsys, *ask, "--method", "fastv", "--save", folder / "other", folder / "a.png", QUESTION)
    assert code == 2 and "chooses by the question" in err
    code, _, err = run(capsys, *ask, "--heatmap", folder / "map.png", folder / "a.png")
    assert code == 2 and "about a bottleneck" in err


def test_a_picture_that_the_method_cannot_take_holds_no_other_up(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One small icon among photos ended `store add`, `compress` and `ask`, and a batch could never go on behind it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in {"a": (64, 64), "b": (17, 16), "c": (60, 64)}.items():  # 88, 36 and 88 tokens
        Image.new("RGB", size, "red").save(photos / f"{name}.png")
    kept = ("--model", folder, "--method", "divprune", "--budget", "45")
    told = f"{photos / 'b.png'}: divprune: a budget is 1 to 36 tokens"
    (tmp_path / "q.txt").write_text(QUESTION)
    for words in (
        ("compress", photos, "--output", tmp_path / "file", *kept),
        ("store", "add", tmp_path / "store", photos, *kept),
        ("batch", photos, "--store", tmp_path / "other", "--questions", tmp_path / "q.txt", "--output", tmp_path / "out",
         "--workers", "0", "--max-new-tokens", "1", *kept),
        ("ask", *sorted(photos.iterdir()), QUESTION, "--max-new-tokens", "1", *kept),
    ):  # fmt: skip
        code, _, err = run(capsys, *words)
        assert code == 1 and told in err, (words, err)
    assert len(CompressedImages.load(tmp_path / "file")) == 2
    for name in ("store", "other"):
        with ImageStore.open(tmp_path / name) as store:
            assert len(store) == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in rows] == [True, False, True]


def test_maps_of_another_family_are_refused_by_name(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Before its configuration or pictures were read as a LLaVA's."""
    for words in (
        ("token-map", folder / "a.png", "--method", "fastv", "--budget", "8", "--output", tmp_path / "a.png"),
        ("heatmap", folder / "a.png", folder / "photos" / "2.png", "--output", tmp_path / "a.png"),
    ):
        code, _, err = run(capsys, *words, "--model", folder)
        assert code == 2 and "LlavaNextForConditionalGeneration has none: give a LLaVA or ours" in err, err


def test_benchmarks_run_on_any_family(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`eval MODEL --method ... --budget` took LLaVA only."""
    arguments = ("--task", "pictograms", "--limit", "2", "--output", tmp_path, "--method", "divprune", "--budget", "0.25")
    code, out, err = run(capsys, "eval", folder, *arguments)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["n_questions"] == 2
    settings = json.loads(next(tmp_path.glob("*/settings.json")).read_text(encoding="utf-8"))
    assert settings["model"]["method"] == {"name": "divprune", "budget": 0.25}


def answers(folder: Path, method: str, **settings: Any) -> list[str]:
    """What `htc_vlm.generate` says of each photo."""
    model, processor = htc_vlm.load(folder)
    out = []
    for file in sorted((folder / "photos").iterdir()):
        kept = htc_vlm.compress(model, processor, [Image.open(file).convert("RGB")], method, **settings)
        out += htc_vlm.generate(model, processor, compressed=kept, text=[QUESTION], max_new_tokens=3)
    return out


def test_files_and_stores_of_a_stock_model_answer_as_generate(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`compress`, `store add` and `batch` refused models without a bottleneck. The store knows its method by itself."""
    method, expected = ("--method", "divprune", "--budget", "8"), answers(folder, "divprune", budget=8)
    assert len(set(expected)) > 1
    kept, album = tmp_path / "kept", tmp_path / "album"
    code, _, err = run(capsys, "compress", folder / "photos", "--output", kept, "--model", folder, *method)
    assert code == 0, err
    ask = ("ask", "--model", folder, "--json", "--max-new-tokens", "3", QUESTION, "--from")
    _, out, _ = run(capsys, *ask, kept)
    assert [row["answers"][0]["answer"] for row in json.loads(out)["pictures"]] == expected
    code, _, err = run(capsys, "store", "add", album, folder / "photos", "--model", folder, "--device", "cpu", *method)
    assert code == 0, err
    run(capsys, "store", "get", album, *sorted((folder / "photos").iterdir()), "--output", tmp_path / "got")
    _, out, _ = run(capsys, *ask, tmp_path / "got")
    assert [row["answers"][0]["answer"] for row in json.loads(out)["pictures"]] == expected
    (tmp_path / "q.txt").write_text(QUESTION)
    batch = ("batch", folder / "photos", "--model", folder, "--questions", tmp_path / "q.txt", "--max-new-tokens", "3")
    batch = (*batch, "--workers", "0", "--store", album)
    for more, output in (((), tmp_path / "a"), (method, tmp_path / "b")):
        code, _, err = run(capsys, *batch, "--output", output, *more)
        assert code == 0, err
        rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
        assert [row["answer"] for row in rows] == expected


def test_pictures_of_other_counts_of_tokens_go_into_a_store(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A file holds images of one count, and said so after the last picture; broken pictures are rows with their error."""
    code, _, err = run(
        capsys, "compress", folder / "photos", "--output", tmp_path / "kept", "--model", folder, "--method", "none"
    )
    assert code == 2 and "1.png gives" in err and "htc-vlm store add" in err
    photos = shutil.copytree(folder / "photos", tmp_path / "photos")
    (photos / "3.png").write_bytes(b"no picture")
    (tmp_path / "q.txt").write_text(QUESTION)
    code, _, err = run(
        capsys, "batch", photos, "--model", folder, "--questions", tmp_path / "q.txt", "--max-new-tokens", "3",
        "--workers", "0", "--store", tmp_path / "s", "--output", tmp_path / "o", "--method", "none",
    )  # fmt: skip
    assert code == 1 and "3.png" in err
    rows = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [*answers(folder, "none"), None] and "not a picture" in rows[3]["error"]
    with ImageStore.open(tmp_path / "s") as store:
        assert store.method == {"name": "none"} and len({store.get([one]).n_bottleneck for one in store.list()}) == 3


COMMANDS = {
    "compress": ["compress", "PHOTOS", "--output", "OUT"],
    "store": ["store", "add", "OUT", "PHOTOS"],
    "batch": ["batch", "PHOTOS", "--store", "OUT", "--output", "OUT.rows", "--questions", "QUESTIONS"],
    "serve": ["serve", "--store", "OUT", "--port", "PORT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_kept_is_refused_by_name(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A question-dependent method keeps for one question what others would need; before a model is loaded."""
    (tmp_path / "q.txt").write_text(QUESTION)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places: dict[str, Any] = {"PORT": port, "PHOTOS": folder / "photos", "QUESTIONS": tmp_path / "q.txt"}
    places |= {"OUT": tmp_path / "out", "OUT.rows": tmp_path / "o"}
    words = [places.get(word, word) for word in COMMANDS[command]]
    cases = {
        "fastv chooses by the question": ["--model", folder, "--method", "fastv", "--budget", "8"],
        "name a question-independent method": ["--model", folder],
        "none keeps all tokens; leave out budget": ["--model", folder, "--method", "none", "--budget", "8"],
        "--budget sets the settings of a --method": ["--model", folder, "--budget", "8"],
        "compresses with its own bottleneck; leave out method": ["--method", "divprune"],
    }
    if command in ("store", "batch"):
        cases["maps are of what a bottleneck looked at"] = ["--model", folder, "--method", "none", "--maps"]
    for told, more in cases.items():
        code, _, err = run(capsys, *words, *more)
        assert code == 2 and told in err, (told, err)
        assert not (tmp_path / "out").exists()
