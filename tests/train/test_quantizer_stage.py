"""The tokenizer stage: which pictures it learns from, and that wrong settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from htc_vlm.quantizers.mgvq import MGVQ
from htc_vlm.tiny import pictograms
from htc_vlm.train import quantizer_stage
from htc_vlm.train.quantizer_stage import train_tokenizer_stage

from .. import tiny_runs as tiny

BLOCK = {"image_size": 32, "n_pictures": 6, "changes": tiny.SIZES, "steps": 2, "batch_size": 2, "crop": 16, "warmup_steps": 1}


def preset(**block: Any) -> dict[str, Any]:
    return {**tiny.preset(), "stages": {"tokenizer": {**BLOCK, **block}}}


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_stage, "N_HELD_OUT", 2)


def test_it_leaves_a_quantizer_that_the_compress_stage_can_load(tmp_path: Path) -> None:
    """The stage's output folder is what --mgvq takes."""
    report = train_tokenizer_stage(preset(), tmp_path / "mgvq")
    assert (report["steps"], report["trained"]["n_pictures"], report["held_out"]["n_pictures"]) == (2, 6, 2)
    from htc_vlm.model.add_compressor import with_compressor

    model = with_compressor(tiny.checkpoint(tiny.NONE), tiny.HTC, tmp_path / "mgvq")[0]
    there, here = MGVQ.load(tmp_path / "mgvq").state_dict(), model.model.compressor.quantizer.state_dict()
    assert all(np.array_equal(there[name].numpy(), value.numpy()) for name, value in here.items())


def test_pictures_come_evenly_from_the_training_split() -> None:
    """The first n of a data set sorted by class would be one class."""
    got = quantizer_stage._pictures("pictograms", "val", 3, 160)
    expected = [np.asarray(pictograms.picture(f"val/{number}")) for number in (0, 499, 999)]
    assert np.array_equal(got, np.stack(expected))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stps": 3}, "unknown stage setting 'stps'; known: .*image_size"),
        ({"image_size": None}, "image_size is None; give the pictures' side in pixels"),
        ({"steps": "many"}, "steps is 'many'; give a whole number"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    """They were a TypeError with a traceback."""
    with pytest.raises(ValueError, match=message):
        train_tokenizer_stage(preset(**wrong), tmp_path)


def test_a_preset_without_the_stage_is_refused(tmp_path: Path) -> None:
    """It was a KeyError."""
    with pytest.raises(ValueError, match="preset 'small' has no stage 'tokenizer'; it has: align, instruct, compress"):
        train_tokenizer_stage(tiny.preset(), tmp_path)
