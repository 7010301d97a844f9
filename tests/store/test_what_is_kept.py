"""Which pictures of a folder a store takes, and at which budgets a stock model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from htc_vlm import ImageStore
from htc_vlm.store.encoding import encoder_of
from htc_vlm.store.pictures import paths_of
from htc_vlm.testing import tiny_model
from htc_vlm.testing.processor import TinyProcessor


def test_hidden_files_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    """As `compress` and `batch` do: a Mac's `._a.png` is no picture, and thumbnails were kept beside their photos."""
    for name in ("a.png", "._a.png", ".thumbnails/a.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert paths_of(tmp_path) == [tmp_path / "a.png", tmp_path / "sub" / "b.png"]
    assert paths_of(tmp_path / "._a.png") == [tmp_path / "._a.png"]


class NativeResolution(TinyProcessor):
    """Large pictures have 24 tokens, those of up to 64 x 64 pixels 8."""

    def __call__(self, images: Sequence[Any], text: Sequence[str], return_tensors: str = "pt") -> Any:
        return super().__call__([2 if picture.width > 64 else 1 for picture in images], text)


def test_more_tokens_than_a_small_picture_has_can_be_kept_of_a_large_one(tmp_path: Path) -> None:
    """A picture of 64 x 64 was tried when a store was opened: on Qwen2.5-VL, which makes four tokens of it, the documented
    `--method divprune --budget 64` was refused for every folder."""
    model, processor = tiny_model("qwen2_5_vl")[0], NativeResolution("qwen2_5_vl")
    with ImageStore.open(tmp_path / "store", model, processor, method={"name": "divprune", "n_keep": 20}) as store:
        (one,) = store.add(Image.new("RGB", (96, 80), "red"))
        assert store.get(one).n_bottleneck >= 20
        with pytest.warns(UserWarning, match="n_keep is 20; there are only 8"):
            assert store.add([Image.new("RGB", (16, 16)), Image.new("RGB", (96, 80), "red")]) == [one]
    with pytest.raises(ValueError, match="acts in a CLIP tower"):  # told when the store is opened
        encoder_of(model, processor, {"name": "visionzip", "n_dominant": 3, "n_contextual": 2})
    with pytest.raises(ValueError, match="method is {'n_keep': 20}; give its name"):
        encoder_of(model, processor, {"n_keep": 20})
