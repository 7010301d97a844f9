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
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from htc_vlm.files import write_json
from htc_vlm.tiny import pictograms, scenes

if TYPE_CHECKING:  # reading a list of tasks must not cost seconds of imports
    from torch import Tensor

    from htc_vlm.tiny.tower import EfficientNetLiteModel

CROPS = "crops.json"
SURE = 0.5  # probability from which the tower's class is taken as a crop's name
CROPS_OF_A_PHOTO = 30
LARGEST = 640  # pixels of the longer side of a photo in memory
UNREADABLE = (OSError, ValueError, Image.DecompressionBombError)
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
# Kind of thing -> numbers of ImageNet's classes (WordNet's order). A class that is in none has a name only.
CLASSES = {
    "fish": "0-6 389-397",
    "bird": "7-24 80-100 127-146",
    "animal": "25-79 107-126",
    "mammal": "101-106 147-299 330-388",
    "insect": "300-326",
    "vehicle": (
        "403-405 407 408 436 444 450 466 468 472 484 510 511 537 547 554 555 561 565 569 573 575 576 586 "
        "603 609 612 625 627 628 654 656 661 665 670 671 675 690 705 717 724 734 751 757 779 780 802 803 "
        "812 814 817 820 829 833 847 864 866 867 870 871 874 880 895 914"
    ),
    "building": (
        "415 424 425 437 442 449 454 467 483 497 498 500 538 580 582 624 634 663 668 682 698 727 743 762 "
        "788 821 832 839 860 865 873 888 900 915"
    ),
    "piece of clothing": (
        "399 400 411 433 439 445 451 452 457 459 461 474 496 501 502 514 515 518 529 552 560 568 578 601 "
        "608 610 614 615 617 630 638 639 652 655 658 667 689 697 715 735 770 774 775 793 796 806 808 824 "
        "834 836 837 841 842 869 887 906"
    ),
    "musical instrument": (
        "401 402 420 432 486 494 513 541 546 558 566 577 579 593 594 641 642 683 684 687 699 776 822 875 "
        "881 889"
    ),
    "sports item": "416 422 429 430 522 543 574 602 722 746 747 752 768 795 805 852 890",
    "tool": "473 499 512 587 596 623 677 726 730 731 740 783 784 792",
    "household item": (
        "412 414 423 431 434 435 440 441 453 462 463 470 492 493 495 504 505 516 520 521 526 532-534 539 "
        "544 545 548 550 553 556 559 564 567 572 588 589 606 618 619 631 637 648 651 653 659 692 700 703 "
        "709-711 719-721 725 728 729 737 738 750 760 761 765 766 773 794 799 804 809 813 827 828 831 846 "
        "848 849 851 859 861 868 876 879 882 883 892 894 896-899 901 904 905 907 909 910 923 968 999"
    ),
    "vegetable": "936-946",
    "fruit": "948-957",
    "food": "924-935 959-965",
    "drink": "966 967 969",
    "plant": "984-990",
    "landscape": "970 972-980",
    "person": "981-983",
}
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # wallpapers have 168 megapixels
        opened = Image.open(io.BytesIO(_webps_in(f"{path}.rcc")[int(number)]) if number else folder() / file)
    opened.draft("RGB", (LARGEST, LARGEST))  # JPEGs alone have it
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
    """(file, crops to look at) of every photo: large ones in parts, too."""
    root = folder()
    found = [(file, CROPS_OF_A_PHOTO) for file in backgrounds()]
    for name in ("categorization", "explore_monuments", "explore_world_animals", "explore_farm_animals", "instruments"):
        file = f"usr/share/gcompris-qt/rcc/{name}.rcc"
        if (root / file).is_file():
            found += [(f"{file}:{i}", 1) for i in range(len(_webps_in(file)))]
    return found


def drawings() -> list[Thing]:
    """Open Clip Art's animals, food and vehicles, nameless: of those that the head is sure of, it is wrong about half."""
    clips = folder() / "usr/share/openclipart/png"
    files = [file for part in ("animals", "food", "transportation") for file in sorted((clips / part).rglob("*.png"))]
    return [Thing(str(file.relative_to(folder())), "") for file in files]


def looked_at(limit: int | None = None) -> Iterator[list[Thing]]:
    """The nameless crops of each photo, the whole photo first. limit: of so many photos only, evenly spread."""
    every = photos()
    rng = np.random.default_rng(0)
    for file, n_crops in every[:: max(1, len(every) // limit)] if limit else every:
        boxes = [(0.0, 0.0, 1.0, 1.0), *(_box(rng) for _ in range(n_crops - 1))]
        yield [Thing(file, "", None, box) for box in boxes]


def some_crops(n: int) -> Iterator[Image.Image]:
    """n RGB crops of photos, and drawings; fewer where there are not so many that can be read."""
    every = [*(crop for crops_of_one in looked_at() for crop in crops_of_one), *drawings()]
    for i in np.random.default_rng(1).permutation(len(every))[:n]:
        try:
            yield on_white(drawing(every[int(i)]))
        except UNREADABLE:
            continue


def label_crops(tower: EfficientNetLiteModel, head: tuple[Tensor, Tensor], limit: int | None = None) -> int:
    """Name crops of all photos by the tower's ImageNet head (weight, bias) and write those it is SURE of to crops.json.

    limit: see `looked_at`. Returns how many crops were kept. Unreadable pictures are passed over.
    """
    import torch

    from htc_vlm.tiny.features import load_picture

    names, kept = class_names(), []
    for looked in looked_at(limit):
        try:
            shown = [load_picture(on_white(drawing(crop)), tower.config.image_size).pixel_values for crop in looked]
        except UNREADABLE:
            continue
        with torch.inference_mode():
            pooled = tower.maps(torch.stack(shown))[0].mean(dim=(2, 3))
        shares, classes = (pooled @ head[0].T + head[1]).softmax(-1).max(-1)
        for crop, share, number in zip(looked, shares.tolist(), classes.tolist(), strict=True):
            if share >= SURE:
                kept.append(Thing(crop.file, names[number], class_kind(number), crop.box))
    write_json(folder() / CROPS, {"made_by": made_by(), "crops": [asdict(thing) for thing in kept]})
    crops.cache_clear()
    return len(kept)


def made_by() -> dict[str, Any]:
    """What decides which crops there are, beside the packages."""
    return {"sure": SURE, "crops_of_a_photo": CROPS_OF_A_PHOTO, "classes": zlib.crc32(repr(CLASSES).encode()), "of": "photos"}


def are_named() -> bool:
    """Is there a crops.json, made as today's code makes it?"""
    return _named() is not None


def _named() -> list[dict[str, Any]] | None:
    """The rows of crops.json, or None where there is none that today's code made."""
    file = folder() / CROPS
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found["crops"] if isinstance(found, dict) and found.get("made_by") == made_by() else None


def _box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    side = float(rng.uniform(0.3, 0.8))
    left, upper = (float(value) for value in rng.uniform(0, 1 - side, 2))
    return left, upper, left + side, upper + side


def on_white(rgba: Image.Image) -> Image.Image:
    """RGB"""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@lru_cache(maxsize=1)
def crops() -> tuple[Thing, ...]:
    """The crops that the tower named. FileNotFoundError where `htc-vlm data photo` has not been run, by this version."""
    file, rows = folder() / CROPS, _named()
    if rows is None:
        what = "of another version" if file.is_file() else "missing"
        raise FileNotFoundError(f"{file} is {what}: `htc-vlm data photo --data DIR` names crops of the photos once, in minutes")
    return tuple(Thing(**{**row, "box": tuple(row["box"])}) for row in rows)


@lru_cache(maxsize=1)
def class_names() -> tuple[str, ...]:
    """What ImageNet's 1,000 classes are called, lower case: the first of the synonyms, or the one that says it more fully."""
    file = folder() / "usr/share/doc/opencv-doc/examples/data/dnn/classification_classes_ILSVRC2012.txt"
    return tuple(fullest(line.lower().split(",")) for line in file.read_text(encoding="utf-8").splitlines())


def fullest(synonyms: Sequence[str]) -> str:
    """The first synonym, or one of up to three words that begins or ends with it.

    >>> fullest(["monarch", " monarch butterfly", " milkweed butterfly"]), fullest(["lion", " king of beasts"])
    ('monarch butterfly', 'lion')
    """
    first, *others = (synonym.strip() for synonym in synonyms)
    fuller = (name for name in others if name.startswith(f"{first} ") or name.endswith(f" {first}"))
    return next((name for name in fuller if len(name.split()) <= 3), first)


@lru_cache(maxsize=1000)
def class_kind(number: int) -> str | None:
    """The kind of thing that a class of ImageNet is; None where it is none of ours.

    >>> class_kind(281), class_kind(967), class_kind(971)      # tabby, espresso, bubble
    ('mammal', 'drink', None)
    """
    for kind, numbers in CLASSES.items():
        for first, _, last in (part.partition("-") for part in numbers.split()):
            if int(first) <= number <= int(last or first):
                return kind
    return None


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
