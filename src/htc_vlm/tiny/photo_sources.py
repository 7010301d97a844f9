"""What the photo world is made of: named cut-outs, backgrounds, crops of photos named by the tower, and the test photos.

Source:  Tux Paint's stamps and captions, wallpapers of MATE and Lomiri, GCompris' pictures, Open Clip Art, our atlas of
         pictograms; ImageNet's class names as OpenCV lists them. Licences: docs/photo.md.
Differs: names are the captions' nouns. No person has named the crops: they have the class to which the tower's own ImageNet
         head gives at least SURE. Photos of scikit-image, gradio and opencv-doc are for testing and in nothing else.

`scripts/fetch_photo.sh DIR` puts the packages into DIR/photo; `label_crops` (`htc-vlm data photo`) adds crops.json.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from htc_vlm.files import write_json
from htc_vlm.tiny import pictograms, scenes

if TYPE_CHECKING:  # reading a list of tasks must not cost seconds of imports
    from torch import Tensor

    from htc_vlm.tiny.tower import EfficientNetLiteModel

CROPS = "crops.json"
SURE = 0.6  # probability from which the tower's class is taken as a crop's name
LARGEST = 640  # pixels of the longer side of a photo in memory
ANSWERS = Path(__file__).parent / "photo_answers.json"
# Folder of Tux Paint's stamps -> kind of thing; the first that fits.
STAMPS = {
    "animals/birds": "bird", "animals/fish": "fish", "animals/insects": "insect", "animals/mammals": "mammal",
    "animals": "animal", "food/fruit": "fruit", "food/vegetables": "vegetable", "food": "food", "vehicles": "vehicle",
    "clothes": "piece of clothing",
    "household/tools": "tool", "household": "household item", "plants": "plant", "town/houses": "building",
    "hobbies/music": "musical instrument", "sports": "sports item",
}  # fmt: skip
PICTOGRAMS = {"bug": "insect", "dish": "food", "clothing": "piece of clothing", "instrument": "musical instrument"}
# ImageNet's classes stand in the order of WordNet: (first, last, kind of thing).
CLASSES = (
    (0, 6, "fish"), (7, 24, "bird"), (25, 79, "animal"), (80, 100, "bird"), (101, 106, "mammal"), (107, 126, "animal"),
    (127, 146, "bird"), (147, 299, "mammal"), (300, 326, "insect"), (330, 388, "mammal"), (389, 397, "fish"),
    (948, 957, "fruit"),
)  # fmt: skip
CAPTION = re.compile(r"^An? ([A-Za-z '-]+?)[.!(]")
LEFT_OUT = ("very ", "colorful ", "ripe ", "big ", "huge ", "large ")  # at the begin of a name


@dataclass(frozen=True)
class Thing:
    """A picture of one thing. file: below the folder, or "pictogram:VENDOR"; box: left, upper, right, lower share of it."""

    file: str
    name: str
    kind: str | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def folder() -> Path:
    """$HTC_VLM_DATA/photo. FileNotFoundError says how to get it."""
    root = os.environ.get("HTC_VLM_DATA")
    found = Path(root or ".") / "photo"
    if root is None or not (found / "usr/share/tuxpaint/stamps").is_dir():
        raise FileNotFoundError(
            "the pictures of the photo world are not here: `scripts/fetch_photo.sh DIR` of a checkout puts them there; "
            f"give DIR with --data (or HTC_VLM_DATA). Looked in: {found if root else 'no folder given'}"
        )
    return found


@lru_cache(maxsize=1)
def cutouts() -> tuple[Thing, ...]:
    """Tux Paint's stamps whose caption names one thing, and the pictograms of the vendors that are trained on."""
    root = folder()
    stamps = root / "usr/share/tuxpaint/stamps"
    found = []
    for file in sorted(stamps.rglob("*.png")):
        where, text = file.relative_to(stamps).as_posix(), file.with_suffix(".txt")
        kind = next((kind for prefix, kind in STAMPS.items() if where.startswith(prefix)), None)
        if kind and "mirror" not in where and text.is_file():
            name = name_in(text.read_text(encoding="utf-8").split("\n")[0])
            found += [Thing(str(file.relative_to(root)), name, kind)] if name else []
    for vendor in pictograms.SEEN:
        for concept in scenes.concepts():
            kind = PICTOGRAMS.get(concept.category, concept.category)
            found.append(Thing(f"pictogram:{vendor}", concept.label, kind))
    return tuple(found)


def name_in(caption: str) -> str | None:
    """The thing that a stamp's caption names; None where it names none, or in more than four words.

    >>> name_in("A brown hen."), name_in("A huge dump truck."), name_in("A ripe, red tomato!"), name_in("Eat your broccoli!")
    ('brown hen', 'dump truck', None, None)
    """
    match = CAPTION.match(caption.replace("’", "'"))
    if match is None:
        return None
    name = match[1].strip().lower()
    for word in LEFT_OUT:
        name = name.removeprefix(word)
    return name if 1 <= len(name.split()) <= 4 else None


@lru_cache(maxsize=1)
def backgrounds() -> tuple[str, ...]:
    """Wallpapers, one file of each: without screenshots and further sizes of the same."""
    share = folder() / "usr/share"
    files: dict[str, Path] = {}
    for file in sorted([*(share / "backgrounds").rglob("*.jpg"), *(share / "wallpapers").rglob("*.jpg")]):
        if "screenshot" not in file.name and "images_dark" not in file.parts:
            files.setdefault(str(file.parents[2]) if file.parent.name == "images" else re.sub(r"_\d+x\d+", "", str(file)), file)
    return tuple(str(file.relative_to(folder())) for file in files.values())


@lru_cache(maxsize=256)
def picture(file: str) -> Image.Image:
    """RGBA, at most LARGEST on a side, its transparent edge cut off; "FILE.rcc:17" is a picture inside a GCompris file."""
    path, _, number = file.partition(".rcc:")
    if number:
        opened = Image.open(io.BytesIO(_webps_in(f"{path}.rcc")[int(number)]))
    else:
        opened = Image.open(folder() / file)
        opened.draft("RGB", (LARGEST, LARGEST))
    rgba = opened.convert("RGBA")
    rgba.thumbnail((LARGEST, LARGEST))
    return rgba.crop(rgba.getchannel("A").getbbox())


@lru_cache(maxsize=2)
def _webps_in(file: str) -> list[bytes]:
    return list(webps((folder() / file).read_bytes()))


def webps(resources: bytes) -> Iterator[bytes]:
    """The WebP pictures inside a Qt resource file, in its order (they are stored as they are).

    >>> [len(one) for one in webps(b"qres..RIFF" + (6).to_bytes(4, "little") + b"WEBP..rest")]
    [14]
    """
    for match in re.finditer(rb"RIFF(.{4})WEBP", resources, re.DOTALL):
        yield resources[match.start() : match.start() + 8 + int.from_bytes(match[1], "little")]


def drawing(thing: Thing) -> Image.Image:
    """The thing's picture, RGBA."""
    if thing.file.startswith("pictogram:"):
        return scenes.drawing(thing.file.removeprefix("pictogram:"), thing.name)
    whole = picture(thing.file)
    left, upper, right, lower = thing.box
    x, y = whole.width, whole.height
    return whole.crop((round(left * x), round(upper * y), round(right * x), round(lower * y)))


# ------------------------------------------------------------------------------------------------ crops of photos
def photos() -> list[tuple[str, int]]:
    """(file, crops to look at) of every picture that may be cropped: photos in parts too, drawings whole."""
    root = folder()
    found = [(file, 12) for file in backgrounds()]
    for name in ("categorization", "explore_monuments", "explore_world_animals", "explore_farm_animals", "instruments"):
        file = f"usr/share/gcompris-qt/rcc/{name}.rcc"
        if (root / file).is_file():
            found += [(f"{file}:{i}", 1) for i in range(len(_webps_in(file)))]
    clips = root / "usr/share/openclipart/png"
    for part in ("animals", "food", "transportation"):
        found += [(str(file.relative_to(root)), 1) for file in sorted((clips / part).rglob("*.png"))]
    return found


def label_crops(tower: EfficientNetLiteModel, head: tuple[Tensor, Tensor], limit: int | None = None) -> int:
    """Name crops of all photos by the tower's ImageNet head (weight, bias) and write those it is SURE of to crops.json.

    limit: look at so many pictures only, evenly spread. Returns how many crops were kept. Unreadable pictures are passed over.
    """
    import torch

    from htc_vlm.tiny.features import load_picture

    names, kept = class_names(), []
    every = photos()
    rng = np.random.default_rng(0)
    for file, n_crops in every[:: max(1, len(every) // limit)] if limit else every:
        try:
            boxes = [(0.0, 0.0, 1.0, 1.0), *(_box(rng) for _ in range(n_crops - 1))]
            looked = [Thing(file, "", None, box) for box in boxes]
            shown = [load_picture(on_white(drawing(crop)), tower.config.image_size).pixel_values for crop in looked]
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        with torch.inference_mode():
            pooled = tower.maps(torch.stack(shown))[0].mean(dim=(2, 3))
        shares, classes = (pooled @ head[0].T + head[1]).softmax(-1).max(-1)
        for crop, share, number in zip(looked, shares.tolist(), classes.tolist(), strict=True):
            if share >= SURE:
                kind = next((kind for first, last, kind in CLASSES if first <= number <= last), None)
                kept.append(Thing(file, names[number], kind, crop.box))
    write_json(folder() / CROPS, [asdict(thing) for thing in kept])
    crops.cache_clear()
    return len(kept)


def _box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    side = float(rng.uniform(0.3, 0.8))
    left, upper = (float(value) for value in rng.uniform(0, 1 - side, 2))
    return left, upper, left + side, upper + side


def on_white(rgba: Image.Image) -> Image.Image:
    """RGB"""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@lru_cache(maxsize=1)
def crops() -> tuple[Thing, ...]:
    """The crops that the tower named. FileNotFoundError where `htc-vlm data photo` has not been run."""
    file = folder() / CROPS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `htc-vlm data photo --data DIR` names crops of the photos once")
    return tuple(Thing(**{**row, "box": tuple(row["box"])}) for row in json.loads(file.read_text(encoding="utf-8")))


def class_names() -> list[str]:
    """ImageNet's 1,000 class names, lower case, without the synonyms after a comma."""
    file = folder() / "usr/share/doc/opencv-doc/examples/data/dnn/classification_classes_ILSVRC2012.txt"
    return [line.split(",")[0].strip().lower() for line in file.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ the test photos
@dataclass(frozen=True)
class AskedPhoto:
    """A photo that is asked about but never trained on: right words for what it shows, for its kind, and what is absent."""

    file: str
    name: str
    also: tuple[str, ...]
    kind: tuple[str, ...]
    absent: str

    def picture(self) -> Image.Image:
        """RGB. FileNotFoundError names the package that is missing."""
        for root in (folder(), folder() / "usr/share/doc"):
            if (root / self.file).is_file():
                with Image.open(root / self.file) as opened:
                    return opened.convert("RGB")
        package = self.file.split("/")[0]
        raise FileNotFoundError(f"{folder() / self.file}: no such photo; fetch {package} (scripts/fetch_photo.sh)")


@lru_cache(maxsize=1)
def asked_photos() -> tuple[AskedPhoto, ...]:
    """All of photo_answers.json, in its order."""
    rows = json.loads(ANSWERS.read_text(encoding="utf-8"))["photos"]
    return tuple(AskedPhoto(r["file"], r["name"], tuple(r["also"]), tuple(r["kind"]), r["absent"]) for r in rows)
