"""The photo world in miniature: the folders of its packages, with six stamps, two wallpapers and two test photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from htc_vlm.tiny import photo, photo_sources

STAMPS = {  # path below Tux Paint's stamps: caption, colour
    "animals/mammals/cat": ("A cat.", (200, 120, 40)),
    "animals/mammals/cat_mirror": ("A cat.", (200, 120, 40)),
    "animals/birds/hen": ("A brown hen.", (140, 90, 50)),
    "food/fruit/apple": ("A red apple.", (220, 30, 30)),
    "vehicles/bus": ("A bus.", (30, 60, 220)),
    "food/vegetables/broccoli": ("Eat your broccoli!", (30, 160, 30)),
}
CROP = {"file": "usr/share/backgrounds/wall.jpg", "name": "tabby", "kind": "mammal", "box": [0.0, 0.0, 0.5, 0.5]}
CACHED = (
    photo.scene, photo.questions, photo._labels, photo._crops_by_name, photo_sources.class_names, photo_sources.cutouts,
    photo_sources.backgrounds, photo_sources.crops, photo_sources.picture, photo_sources._webps_in,
)  # fmt: skip


def make(data: Path, crops: bool = True) -> Path:
    """Write DATA/photo; returns DATA. Callers set HTC_VLM_DATA and `forget` before and after."""
    share = data / "photo" / "usr" / "share"
    for name, (caption, colour) in STAMPS.items():
        file = share / "tuxpaint" / "stamps" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (60, 40), (*colour, 255)).save(file)
        file.with_suffix(".txt").write_text(f"{caption}\nde.utf8=...\n", encoding="utf-8")
    _save(share / "backgrounds" / "wall.jpg", (250, 10, 10))
    _save(share / "backgrounds" / "grey.jpg", (128, 128, 128))
    _save(data / "photo" / "scikit-image" / "skimage" / "data" / "chelsea.png", (90, 90, 90))
    names = share / "doc" / "opencv-doc" / "examples" / "data" / "dnn" / "classification_classes_ILSVRC2012.txt"
    names.parent.mkdir(parents=True)
    names.write_text("".join(f"class {i}, another name\n" for i in range(1000)), encoding="utf-8")
    _save(names.parents[1] / "fruits.jpg", (9, 9, 9))
    if crops:
        write_crops(data / "photo", [CROP])
    return data


def write_crops(folder: Path, crops: list[dict[str, Any]]) -> None:
    """crops.json as `htc-vlm data photo` writes it."""
    written = {"made_by": photo_sources.made_by(), "crops": crops}
    (folder / photo_sources.CROPS).write_text(json.dumps(written), encoding="utf-8")


def _save(file: Path, colour: tuple[int, int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), colour).save(file)


def forget() -> None:
    for cached in CACHED:
        cached.cache_clear()
