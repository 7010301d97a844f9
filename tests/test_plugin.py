"""examples/plugin: a method in a package of its own is found by name, everywhere that our own are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import htc_vlm
import htc_vlm_cli
from htc_vlm import compressors
from htc_vlm.testing import check_compressor, checks_of

from . import tinies

PLUGIN = Path(__file__).resolve().parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the example into, offline."""
    if shutil.which("pip") is None and subprocess.run([sys.executable, "-m", "pip", "--version"]).returncode:
        pytest.skip("no pip")
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("plugin") / "source")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it had been installed beside htc-vlm, for one test."""
    monkeypatch.syspath_prepend(str(site))
    yield
    if "every_nth" in compressors.COMPRESSORS.own_names():
        compressors.COMPRESSORS.unregister("every_nth")
    sys.modules.pop("every_nth", None)


def test_without_the_package_the_name_is_unknown() -> None:
    """A test below that passes without the package would test nothing."""
    assert "every_nth" not in compressors.names()
    with pytest.raises(ValueError, match="unknown compressor 'every_nth'"):
        compressors.build("every_nth")


@pytest.mark.usefixtures("installed")
def test_the_contract_finds_the_method_by_name() -> None:
    """Its author need not import the class; tests/testing has a whole contract of a method that is not ours."""
    checks = {str(check): check for check in checks_of("every_nth")}
    assert len(checks) > 20
    checks["every_nth: keeping everything equals none"]()


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_the_method_keeps_the_contract() -> None:
    """What its author runs, too: pytest examples/plugin."""
    assert len(check_compressor("every_nth")) > 20


@torch.no_grad()
@pytest.mark.usefixtures("installed")
def test_the_method_works_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In apply, in `cost`, and as the compressor of a checkpoint that is saved and loaded."""
    model = tinies.build()
    inputs = tinies.batch([[*[tinies.IMAGE] * tinies.N_PATCHES, 5, 6]])
    with htc_vlm.apply(model, "every_nth", n_keep=4) as run:
        applied = model(**inputs, pixel_values=tinies.pixels(1)).logits
        assert run.schedule == [4] * tinies.N_LAYERS
        assert run.source is not None and run.source[0].argmax(dim=-1).tolist() == [2, 6, 10, 14]  # the middle of each four
    assert htc_vlm_cli.main(["cost", "llava-1.5-7b", "--budget", "64", "--format", "json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["every_nth"]["settings"] == {"n_keep": 64} and rows["every_nth"]["equivalent_tokens"] == 64
    own = tinies.build({"name": "every_nth", "n_keep": 4})
    own.save_pretrained(tmp_path)
    again = htc_vlm.HtcVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again.model.compressor).__name__ == "EveryNth"
    own.load_state_dict(model.state_dict())
    short = tinies.batch([[*[tinies.IMAGE] * 4, 5, 6]])
    torch.testing.assert_close(own(**short, pixel_values=tinies.pixels(1)).logits, applied)


@pytest.mark.slow  # answers questions with a shipped checkpoint
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("how", [["--method", "every_nth", "--budget", "9"], ["--compressor", "every_nth"]])
def test_the_method_is_evaluated_by_name(how: list[str], tmp_path: Path) -> None:
    """`htc-vlm eval` once knew its own package's methods only."""
    if how[0] == "--compressor":
        how = ["--compressor", '{"name": "every_nth", "n_keep": 9}']
    command = ["eval", "tiny-upper", "--task", "pictograms", "--limit", "4", "--output", str(tmp_path), *how]
    assert htc_vlm_cli.main(command) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["n_questions"] == 4


@pytest.mark.usefixtures("installed")
def test_the_benchmark_takes_it_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of methods typed in the benchmark would leave it out."""
    monkeypatch.syspath_prepend(str(PLUGIN.parents[1] / "benchmarks"))
    import methods

    assert ("every_nth", {}) in methods.methods()
    del sys.modules["methods"]
