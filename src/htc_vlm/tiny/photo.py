"""Real words about real pictures: one thing that fills the picture, or two or three side by side, and questions about them.

Source:  pictures and names of others (photo_sources.py says whose).
Differs: scenes, wordings and splits are ours. `test` has new scenes of the cut-outs that are trained on; `photos` has photos of
         other packages, whose right answers were written down before any training (photo_answers.json).

A picture is 224 x 224. Half of them show one thing that fills them (a cut-out, or a crop of a photo as it is), half two or
three cut-outs on a wallpaper or a plain colour. Everything follows from (split, index) and the fetched files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from htc_vlm.tiny import photo_sources as sources
from htc_vlm.tiny.photo_sources import Thing, class_names, some_crops
from htc_vlm.tiny.pictograms import seeded
from htc_vlm.tiny.questions import Question

SIDE = 224
SPLITS = {"train": 50_000, "val": 300, "test": 500}
PHOTOS = "photos"
N_QUESTIONS = 8  # of each picture of a fixed split
N_FIXED = 500  # pictures of a split in its fixed list
KINDS = ("name", "category", "exist", "where", "count", "background")
NUMBERS = ("no", "one", "two", "three")
COLOURS = {
    "white": (245, 245, 245), "black": (25, 25, 28), "gray": (140, 140, 142), "blue": (70, 110, 215), "green": (80, 170, 95),
    "red": (205, 70, 65), "yellow": (238, 210, 90), "pink": (240, 180, 200), "brown": (135, 95, 65),
}  # fmt: skip
# Where things stand, by their number: words, centres across and longer sides, in pixels.
PLACES = {1: ("in the middle",), 2: ("on the left", "on the right"), 3: ("on the left", "in the middle", "on the right")}
CENTRES = {1: (112,), 2: (60, 164), 3: (40, 112, 184)}
SIDES = {1: (170, 260), 2: (80, 112), 3: (62, 78)}
WHAT, KIND = "What is {}?", "What kind of thing is {}?"


@dataclass(frozen=True)
class Placed:
    """A thing with its centre and longer side in pixels. fills: it is the whole picture (a crop of a photo)."""

    thing: Thing
    x: int
    y: int
    side: int
    mirrored: bool
    degrees: float
    fills: bool = False


@dataclass(frozen=True)
class Scene:
    """background: a colour's name, or a wallpaper's file with the square that is seen of it (left, upper, side; shares)."""

    placed: tuple[Placed, ...]
    background: str
    seen: tuple[float, float, float] = (0.0, 0.0, 1.0)


def images(split: str) -> Sequence[str]:
    """Picture ids like "train/17"."""
    if split == PHOTOS:
        return [f"{PHOTOS}/{i}" for i in range(len(sources.asked_photos()))]
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; known: {', '.join([*SPLITS, PHOTOS])}")
    return [f"{split}/{i}" for i in range(SPLITS[split])]


def prepare() -> str:
    """Name crops of the photos by the tower, once; says what there is. FileNotFoundError, ImportError: what is missing."""
    if not sources.are_named():
        from htc_vlm.tiny.tower import imagenet_head, load_imagenet_weights

        tower = load_imagenet_weights()
        tower.config.image_size = SIDE
        sources.label_crops(tower, imagenet_head())
        for cached in (_crops_by_name, _labels, scene, questions):  # drawn from other crops, if at all
            cached.cache_clear()
    n_names = len({thing.name for thing in sources.cutouts()})
    return (
        f"photo: {len(sources.cutouts())} cut-outs of {n_names} names, {len(sources.crops())} crops named by the tower, "
        f"{len(sources.backgrounds())} backgrounds, {len(sources.asked_photos())} test photos"
    )


def version() -> str:
    """8 hex digits of what scenes are drawn from: with another package, or other crops, `train/0` is another picture."""
    parts = (sources.cutouts(), sources.crops(), sources.backgrounds())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


@lru_cache(maxsize=65536)
def scene(image_id: str) -> Scene:
    """The scene behind an id of a split that is composed. ValueError for another id."""
    split, _, index = image_id.partition("/")
    if split not in SPLITS or not index.isdigit() or int(index) >= SPLITS[split]:
        raise ValueError(f"no composed picture {image_id!r}; ids are SPLIT/NUMBER with {SPLITS}")
    rng = seeded("photo scene", split, int(index))
    n_things = int(rng.choice((1, 2, 3), p=(0.5, 0.3, 0.2)))
    crops, cutouts = _crops_by_name(), sources.cutouts()
    mirrored = bool(rng.random() < 0.5)
    if n_things == 1 and crops and rng.random() < 0.5:
        same = crops[int(rng.integers(len(crops)))]  # a name first: of some there are many crops
        crop = same[int(rng.integers(len(same)))]
        return Scene((Placed(crop, SIDE // 2, SIDE // 2, SIDE, mirrored, 0.0, fills=True),), "")
    chosen: dict[str, Thing] = {}
    while len(chosen) < n_things:
        thing = cutouts[int(rng.integers(len(cutouts)))]
        chosen.setdefault(thing.name, thing)
    placed = []
    for thing, centre in zip(chosen.values(), CENTRES[n_things], strict=True):
        x, y = centre + int(rng.integers(-8, 9)), int(rng.integers(70, 155)) if n_things > 1 else SIDE // 2
        side = int(rng.integers(*SIDES[n_things]))
        placed.append(Placed(thing, x, y, side, bool(rng.random() < 0.5), float(rng.uniform(-10, 10))))
    walls = sources.backgrounds()
    if walls and rng.random() < 0.6:
        share = float(rng.uniform(0.5, 1.0))
        seen = (float(rng.uniform(0, 1 - share)), float(rng.uniform(0, 1 - share)), share)
        return Scene(tuple(placed), walls[int(rng.integers(len(walls)))], seen)
    return Scene(tuple(placed), str(rng.choice(list(COLOURS))))


@lru_cache(maxsize=1)
def _crops_by_name() -> list[list[Thing]]:
    names = dict.fromkeys(thing.name for thing in sources.crops())
    return [[thing for thing in sources.crops() if thing.name == name] for name in names]


def picture(image_id: str) -> Image.Image:
    """RGB: a composed picture is 224 x 224, a test photo as it is."""
    split, _, index = image_id.partition("/")
    return sources.asked_photos()[int(index)].picture() if split == PHOTOS else draw(scene(image_id))


def draw(scene: Scene) -> Image.Image:
    """224 x 224 RGB"""
    first = scene.placed[0]
    if first.fills:
        whole = sources.on_white(sources.drawing(first.thing)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if first.mirrored else whole
    canvas = _ground(scene)
    for one in scene.placed:
        drawing = sources.drawing(one.thing)
        if one.mirrored:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = one.side / max(drawing.size)
        drawing = drawing.resize((max(8, round(drawing.width * scale)), max(8, round(drawing.height * scale))))
        drawing = drawing.rotate(one.degrees, Image.Resampling.BILINEAR, expand=True)
        canvas.paste(drawing, (one.x - drawing.width // 2, one.y - drawing.height // 2), drawing)
    return canvas


def _ground(scene: Scene) -> Image.Image:
    if scene.background in COLOURS:
        return Image.new("RGB", (SIDE, SIDE), COLOURS[scene.background])
    wall = sources.on_white(sources.picture(scene.background))
    left, upper, share = scene.seen
    side = share * min(wall.size)
    x, y = left * wall.width, upper * wall.height
    x, y = min(x, wall.width - side), min(y, wall.height - side)
    return wall.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))


def patch_words(image_id: str, n_side: int) -> list[list[str]]:
    """The name and the kind of the thing that each of n_side x n_side patches lies on, raster order; [] beside all things."""
    out: list[list[str]] = []
    for patch in range(n_side * n_side):
        x, y = ((patch % n_side) + 0.5) * SIDE / n_side, ((patch // n_side) + 0.5) * SIDE / n_side
        here = [one for one in scene(image_id).placed if max(abs(x - one.x), abs(y - one.y)) <= 0.35 * one.side]
        out.append([word for one in here[:1] for word in (one.thing.name, one.thing.kind) if word])
    return out


# ------------------------------------------------------------------------------------------------ questions
def a(name: str) -> str:
    """
    >>> a("lion"), a("orange"), a("jeans")
    ('a lion', 'an orange', 'jeans')
    """
    if name.split()[-1] in PLURALS:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


PLURALS = ("broccoli", "food", "garlic", "gloves", "grapes", "jeans", "pancakes", "popcorn", "shorts", "socks", "sushi")


def ask(
    scene: Scene, n: int, rng: np.random.Generator, weights: Mapping[str, float] | None = None
) -> list[tuple[str, str, str]]:
    """Up to n different (kind, question, answer) about a scene, in random order, kinds drawn by weight (default: all alike).

    Among all that can be asked there are as many answered yes as no.
    """
    rows = {kind: _asked(scene, kind, rng) for kind in KINDS if weights is None or weights.get(kind)}
    pool = [(kind, text, answer) for kind, asked in rows.items() for text, answer in asked]
    if not pool:
        return []
    shares = np.array([(weights or {}).get(kind, 1.0) / len(rows[kind]) for kind, _, _ in pool])
    chosen = rng.choice(len(pool), size=min(n, len(pool)), replace=False, p=shares / shares.sum())
    return [pool[int(i)] for i in chosen]


def _asked(scene: Scene, kind: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """All (question, answer) of one kind about a scene; of the many that are answered no a few."""
    things, places = [one.thing for one in scene.placed], PLACES[len(scene.placed)]
    which = list(places) if len(things) > 1 else ["this"]
    if kind == "name":
        return [(WHAT.format(w), a(thing.name).capitalize()) for thing, w in zip(things, which, strict=True)]
    if kind == "category":
        return [(KIND.format(w), a(thing.kind).capitalize()) for thing, w in zip(things, which, strict=True) if thing.kind]
    if kind == "where" and len(things) > 1:
        return [(f"Where is the {thing.name}?", place.capitalize()) for thing, place in zip(things, places, strict=True)]
    if kind == "count" and not scene.placed[0].fills:
        return [("How many things are there?", NUMBERS[len(things)].capitalize())]
    if kind == "background" and scene.background in COLOURS:
        return [("What colour is the background?", scene.background.capitalize())]
    if kind == "exist":
        here = {word for thing in things for word in (thing.name, thing.kind) if word}
        absent = [word for word, kind in _some_labels(rng) if _is_absent(word, kind, scene)]
        n = min(len(here), len(absent))  # one thing has a name and a kind, and everything else is absent
        answered = [(word, "Yes") for word in sorted(here)[:n]] + [(word, "No") for word in absent[:n]]
        return [(f"Is there {a(word)}?", answer) for word, answer in answered]
    return []


WIDE = ("landscape", "building", "person")  # beside such a thing there may be plants, vehicles, clothes, ...
LIVING = ("animal", "bird", "fish", "insect", "mammal")
NARROWER = {"animal": LIVING, "food": ("fruit", "vegetable"), "household item": ("tool",)}


def _is_absent(word: str, kind: str, scene: Scene) -> bool:
    """Is a name of this kind, or the kind itself, surely not in the scene?

    ImageNet's names ("tabby cat") and those of the cut-outs ("cat") may be of one thing, so of one kind none is sure to be
    absent. A crop of unknown kind shows nothing living, nor does one of a view, in which there may be anything else.
    """
    for one in scene.placed:
        thing = one.thing
        if set(word.split()) & set(f"{thing.name} {thing.kind}".split()) or thing.kind in NARROWER.get(word, ()):
            return False
        from_tower = one.fills or word in class_names()
        if from_tower and (kind == thing.kind or (thing.kind in (None, *WIDE) and kind not in LIVING)):
            return False
    return True


@lru_cache(maxsize=1)
def _labels() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, its kind, "" if it has none) of every cut-out and crop, and (kind, kind)."""
    names = sorted({(thing.name, thing.kind or "") for thing in (*sources.cutouts(), *sources.crops())})
    return names, sorted({(kind, kind) for _, kind in names if kind})


def _some_labels(rng: np.random.Generator, n: int = 4) -> list[tuple[str, str]]:
    """n names and n kinds, at random and in random order, no word twice."""
    drawn = [rows[int(i)] for rows in _labels() for i in rng.integers(len(rows), size=n)]
    return list({drawn[int(i)][0]: drawn[int(i)] for i in rng.permutation(len(drawn))}.values())


def sample_questions(image_id: str, n: int, seed: int, weights: Mapping[str, float] | None = None) -> list[Question]:
    """n questions for training, drawn from (picture, seed); see `ask`."""
    rows = ask(scene(image_id), n, seeded("photo train", image_id, seed), weights)
    return _numbered(rows, image_id, f"{seed}.")


def _numbered(rows: Sequence[tuple[str, str, str]], image_id: str, prefix: str = "") -> list[Question]:
    return [Question(f"photo/{image_id}/{prefix}{i}", image_id, *row[1:], row[0]) for i, row in enumerate(rows)]


@lru_cache(maxsize=4)
def questions(split: str) -> list[Question]:
    """The fixed list of a split: up to 8 a picture; of the photos what each is, of which kind, and two answered yes and no."""
    if split == PHOTOS:
        return [question for i, photo in enumerate(sources.asked_photos()) for question in _of_photo(i, photo)]
    out = []
    for image_id in images(split)[:N_FIXED]:
        out += _numbered(ask(scene(image_id), N_QUESTIONS, seeded("photo fixed", image_id)), image_id)
    return out


def _of_photo(number: int, photo: sources.AskedPhoto) -> list[Question]:
    rows = [
        ("name", WHAT.format("this"), a(photo.name).capitalize()),
        ("category", KIND.format("this"), a(photo.kind[0]).capitalize()),
        ("exist", f"Is there {a(photo.name)}?", "Yes"),
        ("exist", f"Is there {a(photo.absent)}?", "No"),
    ]
    return _numbered(rows, f"{PHOTOS}/{number}")


def accepted(question: Question) -> tuple[str, ...]:
    """The words of which an answer about a photo holds one; () where it is compared as a whole."""
    split, _, index = question.image.partition("/")
    if split != PHOTOS or question.kind not in ("name", "category"):
        return ()
    photo = sources.asked_photos()[int(index)]
    return (photo.name, *photo.also) if question.kind == "name" else photo.kind


__all__ = ["accepted", "ask", "class_names", "images", "patch_words", "picture", "prepare", "questions", "sample_questions",
           "scene", "some_crops", "version"]  # fmt: skip
