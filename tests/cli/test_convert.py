"""`htc-vlm convert`: from a folder to a folder, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import htc_vlm_cli
from htc_vlm.cli.convert import compressor_options
from htc_vlm.model import HtcVlmForConditionalGeneration, HtcVlmProcessor
from htc_vlm.quantizers.mgvq import MGVQ

from .. import tinies
from ..tinies import TINY_CODE

CODE = {name: value for name, value in TINY_CODE.items() if name != "image_size"}
SETTINGS = ["--set", f"compressor.quantizer={json.dumps(TINY_CODE)}", "--set", "compressor.n_anchors=2"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinies.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def mgvq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("mgvq")
    MGVQ(**CODE).save(folder)
    return folder


def test_a_llava_folder_becomes_an_htc_folder(
    stock: Path, mgvq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written must load without any further setting, and answer."""
    out = tmp_path / "out"
    code = htc_vlm_cli.main(["convert", str(stock), "--mgvq", str(mgvq), "--output", str(out), *SETTINGS])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and (report["visual_tokens"], report["cached_tokens"]) == (2 + 16, 1)
    model, processor = HtcVlmForConditionalGeneration.from_pretrained(out), HtcVlmProcessor.from_pretrained(out)
    assert model.config.compressor["n_anchors"] == 2
    assert report["parameters"] == sum(weight.numel() for weight in model.parameters())
    inputs = processor(text="<image> what is it ?", images=tinies.pictures(1), return_tensors="pt")
    assert model.eval().generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_refusals_are_one_line(stock: Path, mgvq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, exit code 2, and nothing half-written."""
    out = tmp_path / "out"
    to = ["--output", str(out)]
    for arguments, message in (
        ([str(tmp_path / "nowhere"), *to], "no config.json there"),
        ([str(stock), *to, *SETTINGS], "--mgvq FILE"),
        ([str(stock), *to, "--compressor", "vocco"], "unknown compressor 'vocco'"),
        ([str(stock), *to, "--compressor", "voco", "--dtype", "float31"], "--dtype 'float31'"),
        ([str(stock), *to, "--set", "n_anchors=2"], "write compressor.KEY=VALUE"),
        ([str(stock), "--output", str(mgvq), "--compressor", "voco"], "already there; give a new folder"),
    ):
        assert htc_vlm_cli.main(["convert", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("htc-vlm convert: ") and message in error
        assert not out.exists()


def test_settings_are_read_as_yaml() -> None:
    options = compressor_options("htc", ["compressor.quantizer.image_size=336", "compressor.fusion=post"])
    assert options == {"name": "htc", "quantizer": {"image_size": 336}, "fusion": "post"}
    for wrong in ("compressor.n_anchors", "n_anchors=3", "quantizer.preset=tiny"):
        with pytest.raises(ValueError, match=r"write (e.g. )?compressor\.(KEY=VALUE|n_anchors)"):
            compressor_options("htc", [wrong])
