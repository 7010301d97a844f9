"""Scenes composed on the fly from pictograms of three vendors, and objective questions about them.

Source:  drawings and names: see `tiny/scenes.py`.
Differs: scenes, wordings and splits are ours. Which vendor drew a thing is not asked: the unseen vendor has no answer there.

`tiny/scenes.py` says what a scene holds and how it is drawn; here everything follows from (split, index).
Splits: train, val, test (Noto and Twemoji, new scenes), val-unseen and test-unseen (Fluent 3D only).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image

from htc_vlm.tiny.questions import Question
from htc_vlm.tiny.scenes import BACKGROUNDS, PATTERNS, PLACES, TILES, TURNS, Scene, Thing, categories, concepts, draw

SPLITS = {"train": 100_000, "val": 1000, "test": 1000, "val-unseen": 1000, "test-unseen": 1000}
SEEN, UNSEEN = ("noto", "twemoji"), ("fluent",)
VENDORS = {"train": SEEN, "val": SEEN, "test": SEEN, "val-unseen": UNSEEN, "test-unseen": UNSEEN}
PLACE_WORDS = ("top-left", "top-right", "bottom-left", "bottom-right")
COUNTS = ("zero", "one", "two", "three", "four")
KINDS = ("name", "category", "exist", "count", "beside", "on", "where", "tile", "size", "turn", "background")
N_QUESTIONS = 12        # of each test image


def _split_of(image_id: str) -> tuple[str, int]:
    split, _, index = image_id.partition("/")
    if split not in SPLITS or not index.isdigit() or int(index) >= SPLITS[split]:
        raise ValueError(f"no pictogram scene {image_id!r}; ids are SPLIT/NUMBER with {SPLITS}")
    return split, int(index)


def seeded(*key: str | int) -> np.random.Generator:
    """A generator that follows from the key alone."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key])


def images(split: str) -> Sequence[str]:
    """Image ids of a split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; known: {', '.join(SPLITS)}")
    return [f"{split}/{i}" for i in range(SPLITS[split])]


@lru_cache(maxsize=65536)
def scene(image_id: str) -> Scene:
    """The scene behind an image id, without drawing it."""
    split, index = _split_of(image_id)
    rng = seeded("scene", split, index)
    n_things = int(rng.choice(4, p=(0.15, 0.25, 0.30, 0.30))) + 1
    cells = sorted(int(cell) for cell in rng.choice(4, n_things, replace=False))
    chosen = rng.choice(len(concepts()), n_things, replace=False)
    tiles = rng.choice(len(TILES), n_things, replace=False)
    things = []
    for cell, number, tile in zip(cells, chosen, tiles, strict=True):
        concept = concepts()[int(number)]
        turn = str(rng.choice(list(TURNS), p=(0.4, 0.2, 0.2, 0.2))) if concept.turns else "upright"
        right, down = (int(v) for v in rng.integers(-5, 6, 2))
        jitter = (right, down, int(rng.integers(0, 7)), float(rng.uniform(-8, 8)))
        size = "big" if rng.random() < 0.5 else "small"
        vendor = str(rng.choice(VENDORS[split]))
        things.append(Thing(concept, vendor, cell, list(TILES)[int(tile)], size, turn, jitter))
    background, pattern = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(PATTERNS))
    return Scene(tuple(things), background, pattern, float(rng.uniform(0.88, 1.08)), int(rng.integers(2**31)))


def n_things(image_id: str) -> int:
    """How many things a scene holds, 1 to 4."""
    return len(scene(image_id).things)


def picture(image_id: str) -> Image.Image:
    """160 x 160 RGB"""
    return draw(scene(image_id))


def patch_words(image_id: str, n_side: int) -> list[list[str]]:
    """What each of n_side x n_side patches shows, raster order: the words of the thing in its cell, or of the background;
    and which quarter of the picture it is in."""
    here = scene(image_id)
    by_cell = {thing.cell: thing for thing in here.things}
    out = []
    for patch in range(n_side * n_side):
        row, column = 2 * (patch // n_side) // n_side, 2 * (patch % n_side) // n_side
        thing = by_cell.get(2 * row + column)
        words = [here.background, here.pattern]
        if thing is not None:
            words = [thing.concept.label, thing.concept.category, thing.tile, thing.size]
            words += [thing.turn] if thing.concept.turns else []
        out.append([*words, *PLACES[2 * row + column].split()])
    return out


# ------------------------------------------------------------------------------------------------ questions
Asked = tuple[str, str] | None      # question and answer; None where the scene has nothing to ask of this kind


def _pick(rng: np.random.Generator, things: Sequence[Thing]) -> Thing:
    return things[int(rng.integers(len(things)))]


def _drawn(rng: np.random.Generator, up_to: np.ndarray) -> int:
    """rng.choice(len(up_to), p=...) for cumulated shares: the same draw in a tenth of the time."""
    return int((up_to / up_to[-1]).searchsorted(rng.random(), side="right"))


def _reference(rng: np.random.Generator, thing: Thing, by_place: float) -> str:
    """"the top left" with probability by_place, else "the cat"."""
    return PLACES[thing.cell] if rng.random() < by_place else thing.concept.label


def _ask_name(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _pick(rng, scene.things)
    return f"what is at the {PLACES[thing.cell]} ?", thing.concept.label


def _ask_category(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _pick(rng, scene.things)
    return f"what kind of thing is at the {PLACES[thing.cell]} ?", thing.concept.category


def _ask_exist(scene: Scene, rng: np.random.Generator, yes: bool | None = None) -> Asked:
    yes = bool(rng.random() < 0.5) if yes is None else yes
    here = {thing.concept.category for thing in scene.things}
    labels = {thing.concept.label for thing in scene.things}
    if rng.random() < 0.6:
        pool = sorted(here) if yes else [c for c in categories() if c not in here]
    elif yes:
        pool = sorted(labels)
    else:
        close = rng.random() < 0.5
        pool = [c.label for c in concepts() if c.label not in labels and (not close or c.category in here)]
    return f"is there a {pool[int(rng.integers(len(pool)))]} ?", "yes" if yes else "no"


def _ask_the_rarer(scene: Scene, rng: np.random.Generator, found: Iterable[tuple[str, str, str]]) -> Asked:
    """`_ask_exist` for the answer that was given less often so far; nothing once every question answered yes is asked."""
    given = Counter(answer for kind, _, answer in found if kind == "exist")
    if given["yes"] != given["no"]:
        return _ask_exist(scene, rng, yes=given["yes"] < given["no"])
    n_yes = len(scene.things) + len({thing.concept.category for thing in scene.things})
    return _ask_exist(scene, rng) if given["yes"] < n_yes else None


def _ask_count(scene: Scene, rng: np.random.Generator) -> Asked:
    if rng.random() < 0.35:
        return "how many things are there ?", COUNTS[len(scene.things)]
    counts = Counter(thing.concept.category for thing in scene.things)
    value = int(rng.choice((0, 1, 1, 2, 2, 3)))
    pool = [category for category in categories() if counts[category] == value]
    pool = pool or [category for category in categories() if counts[category] == 0]
    category = pool[int(rng.integers(len(pool)))]
    return f"how many things are of the kind {category} ?", COUNTS[counts[category]]


_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def _ask_beside(scene: Scene, rng: np.random.Generator) -> Asked:
    by_cell = {thing.cell: thing for thing in scene.things}
    pairs = []
    for thing in scene.things:
        for word, (down, right) in _BESIDE.items():
            row, column = thing.cell // 2 + down, thing.cell % 2 + right
            other = by_cell.get(2 * row + column) if 0 <= row < 2 and 0 <= column < 2 else None
            if other is not None:
                pairs.append((word, thing, other))
    if not pairs:
        return None
    word, thing, other = pairs[int(rng.integers(len(pairs)))]
    reference = f"tile in {thing.tile}" if rng.random() < 0.5 else thing.concept.label
    return f"what is {word} the {reference} ?", other.concept.label


def _ask_on(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _pick(rng, scene.things)
    return f"what is on the tile in {thing.tile} ?", thing.concept.label


def _ask_where(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _pick(rng, scene.things)
    reference = f"tile in {thing.tile}" if rng.random() < 0.5 else thing.concept.label
    return f"where is the {reference} ?", PLACE_WORDS[thing.cell]


def _ask_tile(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _pick(rng, scene.things)
    return f"what colour is behind the {_reference(rng, thing, 0.6)} ?", thing.tile


def _ask_size(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = _pick(rng, scene.things)
    return f"how big is the {_reference(rng, thing, 0.6)} ?", thing.size


_TURNS_UP_TO = np.cumsum((0.19, 0.27, 0.27, 0.27))        # upright things are more common


def _ask_turn(scene: Scene, rng: np.random.Generator) -> Asked:
    wanted = list(TURNS)[_drawn(rng, _TURNS_UP_TO)]
    pool = [thing for thing in scene.things if thing.concept.turns and thing.turn == wanted]
    if not pool:
        return None
    thing = _pick(rng, pool)
    return f"which way up is the {_reference(rng, thing, 0.6)} ?", thing.turn


def _ask_background(scene: Scene, rng: np.random.Generator) -> Asked:
    if rng.random() < 0.5:
        return "what colour is the background ?", scene.background
    return "what pattern is the background ?", scene.pattern


_ASK: dict[str, Callable[[Scene, np.random.Generator], Asked]] = {
    "name": _ask_name, "category": _ask_category, "exist": _ask_exist, "count": _ask_count, "beside": _ask_beside,
    "on": _ask_on, "where": _ask_where, "tile": _ask_tile, "size": _ask_size, "turn": _ask_turn, "background": _ask_background,
}  # fmt: skip


REFERRING = ("name", "category", "on", "where", "tile", "size", "turn")     # kinds about one thing


def ask(
    scene: Scene,
    n: int,
    rng: np.random.Generator,
    weights: Mapping[str, float] | None = None,
    places: Sequence[str] = PLACES,
    paired: bool = False,
) -> list[tuple[str, str, str]]:
    """Up to n different (kind, question, answer) about a scene, kinds drawn by weight (default: all alike).

    places: questions about one thing are asked of things that stand in these places only. paired: as many of the kind `exist`
    are answered yes as no, one more at most; else both are drawn alike, but a scene has few different ones answered yes, and a
    hundred answered no: of 17 questions 45 % are yes, of 56 a quarter.
    """
    unknown = sorted(set(places) - set(PLACES))
    if unknown:
        raise ValueError(f"no place {unknown[0]!r}; places: {', '.join(PLACES)}")
    shares = np.array([(weights or {}).get(kind, 1.0 if weights is None else 0.0) for kind in KINDS])
    shares = shares / shares.sum()
    there = replace(scene, things=tuple(thing for thing in scene.things if PLACES[thing.cell] in places))
    up_to = shares.cumsum()
    found: dict[str, tuple[str, str, str]] = {}
    for _ in range(8 * n):
        if len(found) == n:
            break
        kind = KINDS[_drawn(rng, up_to)]
        if kind in REFERRING and not there.things:
            continue
        if kind == "exist" and paired:
            asked = _ask_the_rarer(scene, rng, found.values())
        else:
            asked = _ASK[kind](there if kind in REFERRING else scene, rng)
        if asked is not None:
            found.setdefault(asked[0], (kind, *asked))
    return list(found.values())


def sample_questions(
    image_id: str,
    n: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
    places: Sequence[str] = PLACES,
    paired: bool = True,
) -> list[Question]:
    """n questions for training, drawn from (image, seed); see `ask`."""
    split, index = _split_of(image_id)
    rows = ask(scene(image_id), n, seeded("train", split, index, seed), weights, places, paired)
    return _numbered(rows, image_id, f"pictograms/{image_id}/{seed}.")


def _numbered(rows: Iterable[tuple[str, str, str]], image_id: str, prefix: str) -> list[Question]:
    return [Question(f"{prefix}{i}", image_id, text, answer, kind) for i, (kind, text, answer) in enumerate(rows)]


@lru_cache(maxsize=4)
def questions(split: str) -> list[Question]:
    """The fixed list of a split: 12 per image."""
    out = []
    for image_id in images(split)[:1000]:
        _, index = _split_of(image_id)
        rows = ask(scene(image_id), N_QUESTIONS, seeded("fixed", split, index))
        out += _numbered(rows, image_id, f"pictograms/{image_id}/")
    return out


def vocabulary() -> list[str]:
    """Every word of every question and answer."""
    fixed = (
        "what is at the ? kind of thing there a how many things are left right above below tile in on where colour behind big "
        "small which way up background pattern yes no upright down top bottom"
    )
    found = set(fixed.split()) | set(PLACE_WORDS) | set(TILES) | set(BACKGROUNDS) | set(PATTERNS) | set(COUNTS) | set(TURNS)
    return sorted(found | {c.label for c in concepts()} | set(categories()))


