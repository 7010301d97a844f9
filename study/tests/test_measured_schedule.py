"""The tokens that a row of the study is charged for are those that entered the layers."""

from __future__ import annotations

import pytest
import torch

from htc_vlm import load
from study.evaluating import measured_schedule


@pytest.mark.parametrize(
    ("compressor", "tokens"),
    [
        ({"name": "voco"}, 36 + 1),
        ({"name": "readers", "n_readers": 8, "n_looks": 1}, 36 + 8),
        ({"name": "readers", "n_readers": 4, "n_looks": 3}, 36 + 3 * 4),
    ],
)
def test_rows_that_look_again_are_counted_at_each_look(compressor: dict[str, object], tokens: int) -> None:
    model, _ = load("tiny-upper", compressor=compressor)
    features = torch.zeros(1, 36, model.config.vision_config.hidden_size)
    assert measured_schedule(model, {"patch_features": features}) == [tokens] * 6
