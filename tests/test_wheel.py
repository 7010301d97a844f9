"""The wheel, built and installed where the source tree is not: what a user gets from `pip install htc-vlm`."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # builds, installs, and runs five commands


def done(command: list[str], cwd: Path, **environment: str) -> str:
    """stdout of a command that ends well, outside the source tree."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HTC_VLM"))}
    out = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, f"{command}: {out.stderr[-3000:]}"
    return out.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], REPO)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the libraries that it needs are taken from this one, htc-vlm is not."""
    folder = tmp_path_factory.mktemp("home")
    done([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], folder)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done([*pip, str(wheel)], folder)
    purelib = Path(done([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (purelib / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")  # a plain path: .pth files there are not read
    return folder


@pytest.fixture(scope="module")
def command(home: Path) -> Any:
    """`htc-vlm` as it was installed -> stdout."""

    def run(*arguments: str) -> str:
        return done([str(home / "env" / "bin" / "htc-vlm"), *arguments], home, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

    return run


def test_the_wheel_holds_the_library_its_data_and_nothing_else(wheel: Path) -> None:
    """Presets and checkpoints were once found in the source tree only."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"htc_vlm/train/presets/tiny.yaml", "htc_vlm/checkpoints/tiny/model.safetensors", "htc_vlm/py.typed",
            "htc_vlm/tiny/atlas/noto.png", "htc_vlm_cli.py"} <= names  # fmt: skip
    folders = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert folders == {"htc_vlm", "htc_vlm_cli.py"}
    source = REPO / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "htc_vlm").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names


def test_the_installed_library_is_the_wheels(home: Path, command: Any) -> None:
    """A test of the source tree under another name would tell nothing."""
    python = str(home / "env" / "bin" / "python")
    code = "import htc_vlm; from htc_vlm.train import presets; print(htc_vlm.__file__); print(presets.find('tiny').is_file())"
    file, found = done([python, "-c", code], home).split()
    assert Path(file).is_relative_to(home) and found == "True"
    assert command("--version").startswith("htc-vlm 0.")


def test_the_four_commands_run(home: Path, command: Any) -> None:
    """ask, cost, two steps of training, and an evaluation, with what the wheel brings and no network."""
    picture = "from htc_vlm.tiny import pictograms as p; p.picture(p.images('test')[0]).save('scene.png')"
    done([str(home / "env" / "bin" / "python"), "-c", picture], home)
    (row,) = json.loads(command("ask", "scene.png", "what is at the top left ?", "--json"))["pictures"]
    assert row["answers"][0]["answer"]
    methods = {row["method"] for row in json.loads(command("cost", "llava-1.5-7b", "--format", "json"))["rows"]}
    assert {"none", "fastv", "htc"} <= methods
    stage = "stages.compress."
    settings = [
        "data=[{task: pictograms, images: 8}]", stage + "compressor={name: voco}", stage + "steps=2", stage + "workers=0",
        stage + "images_per_step=4", stage + "compile=false", stage + "warmup_steps=1",
    ]  # fmt: skip
    pairs = [part for text in settings for part in ("--set", text)]
    start = next((home / "env").rglob("htc_vlm/checkpoints/tiny-upper"))
    command("train", "--preset", "tiny", "--stage", "compress", "--start", str(start), "--output", "trained", *pairs)
    command("eval", "trained/model", "--task", "pictograms", "--limit", "20", "--output", "evaluated")
    (result,) = (home / "evaluated").rglob("result.json")
    assert json.loads(result.read_text())["n_questions"] == 20
