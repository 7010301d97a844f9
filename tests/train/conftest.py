"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from htc_vlm.train import loop


@pytest.fixture(autouse=True, scope="module")
def small_plots() -> Iterator[None]:
    """Runs leave a dot for loss.png: drawing it takes longer than their steps. test_loop.py draws one."""

    def dot(metrics: Path, picture: Path, title: str) -> None:
        Image.new("RGB", (1, 1)).save(picture)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_loss", dot)
        yield
