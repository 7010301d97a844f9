"""`htc-vlm store`: exit code 0 done, 1 partly, 2 refused; refusals are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from htc_vlm import CompressedImages
from htc_vlm_cli import main

from .. import tiny_runs as tiny

Capture = pytest.CaptureFixture[str]


def test_a_store_is_made_asked_thinned_and_merged(tmp_path: Path, capsys: Capture) -> None:
    """The way of an engineer with a folder of pictures, some of them broken."""
    folder, store = tiny.hostile_folder(tmp_path / "wild"), str(tmp_path / "s")
    model = ["--model", str(tiny.checkpoint(tiny.VOCO))]

    def run(*words: str) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        code = main(["store", *words])
        captured = capsys.readouterr()
        return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("htc-vlm")]

    code, out, lines = run("add", store, str(folder), *model, "--dtype", "int8")
    report = json.loads(out)
    assert (code, report["new"], report["images"], report["refused"]) == (1, len(tiny.GOOD), len(tiny.GOOD), len(tiny.BAD) - 1)
    assert report["bytes_per_image"] == tiny.N_LAYERS * 2 * tiny.N_KV_HEADS * (tiny.HEAD_DIM + 2)
    bad = [name for name in tiny.BAD if name != "folder.png"]  # a folder in the folder: looked into, and empty
    assert len(lines) == len(bad) and all(any(name in line for line in lines) for name in bad)
    good = str(folder / "good.png")
    code, out, _ = run("add", store, good, *model)
    assert code == 0 and json.loads(out)["new"] == 0

    code, out, _ = run("list", store, "--json", "--name", "good.png")
    entry = json.loads(out)
    assert code == 0 and entry["names"] == [good]
    assert run("get", store, good, entry["id"], "--output", str(tmp_path / "x.safetensors"))[0] == 0
    assert len(CompressedImages.load(tmp_path / "x.safetensors")) == 2

    code, out, lines = run("remove", store, "typo.png", good)
    assert code == 1 and json.loads(out) == {"removed": 1, "images": len(tiny.GOOD) - 1}
    assert lines == ["htc-vlm store: not removed: typo.png: no image of this id or name"]
    assert run("verify", store)[:2] == (0, f"{len(tiny.GOOD) - 1} images, 0 damaged\n")
    assert run("compact", store)[0] == 0
    run("add", str(tmp_path / "t"), good, *model, "--dtype", "int8")
    code, out, _ = run("merge", store, str(tmp_path / "t"))
    assert code == 0 and json.loads(out) == {"new": 1, "images": len(tiny.GOOD)}

    assert run("get", store, "cat.png", "--output", str(tmp_path / "y.st"))[0::2] == (
        2, [f"htc-vlm store: {store}: no image named 'cat.png'; `htc-vlm store list` shows what there is"]
    )  # fmt: skip
    assert run("list", str(tmp_path / "nowhere"))[0] == 2 and run("remove", store, "0" * 64)[0] == 2
    code, _, lines = run("add", store, str(folder / "text.png"), *model)
    assert code == 2 and len(lines) == 1
