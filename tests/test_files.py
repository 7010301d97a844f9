"""Files are written whole or not at all, as the umask says, and never over a file that is not ours."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image

from htc_vlm import files
from htc_vlm.model.compressed import CompressedImages
from htc_vlm.model.generation_defaults import check_defaults
from htc_vlm_cli import main

from . import tiny_runs as tiny

Capture = pytest.CaptureFixture[str]
MODE = 0o666 & ~files.umask()


def photo(folder: Path, name: str = "photo.jpg") -> tuple[Path, bytes]:
    """A photo of the user's and its bytes."""
    tiny.noise(1).save(folder / name)
    return folder / name, (folder / name).read_bytes()


def album(path: Path) -> Path:
    CompressedImages(torch.zeros(1, 1, 2, 1, 1, 2), "0" * 16, 4).save(path)
    return path


def refused(capsys: Capture, *words: str) -> str:
    """The one line of a command that must refuse."""
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("htc-vlm")]
    assert len(lines) == 1 and captured.out == "", captured.err
    return lines[0]


MODEL = ["--model", "no-such-model"]  # the file is looked at before the model
COMMANDS = {
    "compress --output": ["compress", "OTHER", "--output", "PHOTO", *MODEL],
    "ask --save": ["ask", "OTHER", "what ?", "--save", "PHOTO", *MODEL],
    "ask --heatmap": ["ask", "OTHER", "what ?", "--heatmap", "PHOTO", *MODEL],
    "heatmap --output": ["heatmap", "OTHER", "--output", "PHOTO", *MODEL],
    "heatmap --numbers": ["heatmap", "OTHER", "--output", "NEW", "--numbers", "NOTES", *MODEL],
    "token-map --output": ["token-map", "OTHER", "--method", "fastv", "--output", "PHOTO", *MODEL],
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_command_replaces_a_photo(name: str, tmp_path: Path, capsys: Capture) -> None:
    """`compress --output *.jpg` made an album of the first photo: the shell wrote its name behind --output."""
    places = {"OTHER": photo(tmp_path, "other.png")[0], "PHOTO": photo(tmp_path)[0], "NEW": tmp_path / "new.png"}
    places["NOTES"] = tmp_path / "notes.json"
    places["NOTES"].write_text('{"shopping": ["milk"]}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = [str(places.get(word, word)) for word in COMMANDS[name]]
    line = refused(capsys, *words)
    assert "already there and not written by htc-vlm; give another name, or --force to replace it" in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "no such folder, and no shipped checkpoint" in refused(capsys, *words, "--force")  # past the check


@pytest.mark.parametrize("name", ["compress --output", "ask --save", "ask --heatmap", "heatmap --output", "token-map --output"])
def test_no_command_replaces_what_it_reads(name: str, tmp_path: Path, capsys: Capture) -> None:
    """`heatmap in.jpg --output in.jpg`; also by another spelling of the path, and with --force."""
    path, data = photo(tmp_path)
    places = {"OTHER": str(path), "PHOTO": str(tmp_path / "." / "photo.jpg")}
    words = [places.get(word, word) for word in COMMANDS[name]]
    assert "is read by this command and would be replaced" in refused(capsys, *words, "--force")
    assert path.read_bytes() == data


def test_what_we_wrote_is_ours_and_nothing_else(tmp_path: Path) -> None:
    """A file that cannot be told from a stranger's is a stranger's."""
    import matplotlib.figure

    files.save_figure(matplotlib.figure.Figure(figsize=(1, 1)), tmp_path / "map.png", dpi=50)
    files.write_json(tmp_path / "ours.json", {"made_by": files.MAKER, "rows": []})
    ours = [album(tmp_path / "album"), tmp_path / "map.png", tmp_path / "ours.json", tmp_path / "empty"]
    (tmp_path / "empty").touch()
    assert [path.name for path in ours if not files.made_by_us(path)] == []
    foreign = [photo(tmp_path, "a.png")[0], photo(tmp_path, "a.jpg")[0], tiny.checkpoint(tiny.NONE) / "model.safetensors"]
    strange = {"a.json": '{"made_by": "me"}', "b.json": "[1, 2]", "c.json": "{", "d.txt": "htc-vlm", "e": "x" * 20}
    for name, text in strange.items():
        (tmp_path / name).write_text(text)
        foreign.append(tmp_path / name)
    assert [path.name for path in foreign if files.made_by_us(path)] == []


def test_our_own_files_are_replaced(tmp_path: Path) -> None:
    """Drawing a map again after a change must not need --force."""
    files.check_output(album(tmp_path / "album"))
    assert list(tmp_path.iterdir()) == [tmp_path / "album"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder; give the name of a file in it"),
        ("no/x.png", "its folder does not exist; create it first"),
        ("/dev/null", "is no regular file"),
        ("x.xyz", "its ending says no kind of file that can be written; known: .png"),
    ],
)
def test_places_that_cannot_be_written_are_named(name: str, message: str, tmp_path: Path) -> None:
    """As root, replacing /dev/null by an album breaks the machine."""
    (tmp_path / "folder").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        files.check_output(tmp_path / name, suffixes=(".png",) if name.endswith("xyz") else ())


def test_a_folder_that_cannot_be_written_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A read-only folder was found after all pictures were compressed. (Root may write anywhere: the system's no is acted.)"""

    def no(*words: object, **kw: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", no)
    with pytest.raises(OSError, match=r"cannot be written \(Read-only file system\)") as found:
        files.check_output(tmp_path / "x.st")
    assert found.value.filename == str(tmp_path / "x.st")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no")])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside(error: BaseException, tmp_path: Path) -> None:
    """`.partial` files were left behind, and the message named the partial file or none."""
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(type(error)) as found, files.replacing(path) as partial:
        partial.write_text("ne")
        raise error
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"
    if isinstance(error, OSError):
        assert str(found.value) == f"[Errno 28] No space left on device: '{path}'"


def test_a_full_disk_is_an_os_error_also_from_safetensors(tmp_path: Path) -> None:
    """safetensors' own error passed all handlers and ended in a traceback."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    images = CompressedImages(torch.zeros(100, 1, 2, 1, 1, 2), "0" * 16, 4)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="album"):
            images.save(tmp_path / "album")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_albums_and_checkpoints_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    """safetensors writes 0600: a colleague could not read the album, nor a server under another user the model."""
    from htc_vlm import load
    from htc_vlm.quantizers.mgvq import MGVQ

    model, processor = load(tiny.checkpoint(tiny.VOCO))
    model.save_pretrained(tmp_path / "model")
    MGVQ(**tiny.SIZES).save(tmp_path / "mgvq")
    written = [album(tmp_path / "album"), *(p for name in ("model", "mgvq") for p in (tmp_path / name).iterdir())]
    assert {path.suffix for path in written} >= {".safetensors", ".json"}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == {p.name: oct(MODE) for p in written}


def test_the_umask_is_read_without_being_changed() -> None:
    """0o27: nothing for others."""
    before = os.umask(0o027)
    try:
        assert files.umask() == 0o027 and os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """`convert` that failed half way left a folder behind, and the same command then refused it as already there."""
    with pytest.raises(ValueError, match="no"), files.replacing_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with files.replacing_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text(text)
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("config.json", "new")]


# ------------------------------------------------------------------------------------------ generation_config.json
def test_llavas_own_generation_defaults_convert_and_are_kept_as_far_as_they_act(tmp_path: Path) -> None:
    """temperature and top_p without do_sample, as in many LLaVA folders: `convert` died with a folder half written, and
    training at its first checkpoint. Greedy decoding ignored them before, so nothing changes."""
    import shutil

    start = shutil.copytree(tiny.checkpoint(tiny.NONE), tmp_path / "start")
    defaults = json.loads((start / "generation_config.json").read_text()) | {"temperature": 0.9, "top_p": 0.6, "max_length": 99}
    (start / "generation_config.json").write_text(json.dumps(defaults))
    assert main(["convert", str(start), "--compressor", "voco", "--output", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["max_length"] == 99 and not {"temperature", "top_p"} & set(saved)


def test_generation_defaults_that_cannot_be_saved_are_refused_before_training(tmp_path: Path) -> None:
    """A padding id of -1, as in old Llama folders: said at the start, not at the first checkpoint."""
    from transformers import GenerationConfig

    with pytest.raises(ValueError, match="start: its generation_config.json cannot be kept.*(?s:.)*pad_token_id"):
        check_defaults(GenerationConfig(pad_token_id=-1), "start")
    sampled = GenerationConfig(do_sample=True, temperature=0.9)
    check_defaults(sampled, "start")
    assert sampled.temperature == 0.9


def test_a_figure_without_an_ending_is_written_under_the_name_given(tmp_path: Path) -> None:
    """matplotlib adds .png, and the name that was printed did not exist."""
    import matplotlib.figure

    files.save_figure(matplotlib.figure.Figure(figsize=(1, 1)), tmp_path / "map", dpi=50)
    with Image.open(tmp_path / "map") as picture:
        assert picture.format == "PNG"
