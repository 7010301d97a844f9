"""What a scene of pictograms holds, and how it is drawn.

Source:  drawings: Noto (Apache-2.0), Twemoji (CC-BY 4.0), Fluent 3D (MIT), see atlas/; names: Unicode CLDR (emojibase-data).
Differs: backgrounds, tiles and sizes are ours.

A scene is 160 x 160 pixels: a jittered 2 x 2 grid with one to four different things, each on a rounded tile of its own
colour, big or small, turned by quarter turns; a background colour and a pattern.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ATLAS = Path(__file__).parent / "atlas"
SIDE = 160
PLACES = ("top left", "top right", "bottom left", "bottom right")
TILES: dict[str, tuple[int, int, int]] = {
    "red": (229, 96, 88), "blue": (92, 132, 226), "green": (96, 184, 104), "yellow": (240, 206, 82),
    "purple": (164, 108, 204), "orange": (240, 150, 70),
}  # fmt: skip
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244), "black": (44, 44, 48), "gray": (150, 150, 152), "pink": (244, 186, 206),
    "brown": (150, 112, 84), "cyan": (150, 224, 232), "beige": (232, 218, 186), "navy": (44, 60, 116),
}  # fmt: skip
PATTERNS = ("plain", "stripes", "dots", "checks")
SIZES = {"small": (38, 44), "big": (58, 66)}
TURNS = {"upright": 0, "left": 90, "down": 180, "right": 270}        # counter-clockwise degrees


@dataclass(frozen=True)
class Concept:
    label: str
    category: str
    turns: bool         # False: looks alike when turned, so it stays upright and is never asked about


@dataclass(frozen=True)
class Thing:
    concept: Concept
    vendor: str
    cell: int           # 0..3, see PLACES
    tile: str
    size: str
    turn: str
    jitter: tuple[int, int, int, float]      # pixels right, pixels down, pixels across, degrees


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    pattern: str
    brightness: float
    seed: int


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All concepts, in the order of the atlas."""
    rows = json.loads((ATLAS / "concepts.json").read_text("utf-8"))["concepts"]
    return tuple(Concept(row["label"], row["category"], row["turns"]) for row in rows)


@lru_cache(maxsize=1)
def categories() -> tuple[str, ...]:
    """The kinds of thing, in the order of the atlas."""
    return tuple(dict.fromkeys(concept.category for concept in concepts()))


@lru_cache(maxsize=3)
def drawings(vendor: str) -> dict[str, Image.Image]:
    """Label -> drawing, RGBA, of one vendor."""
    about = json.loads((ATLAS / "concepts.json").read_text("utf-8"))
    cell, columns = about["cell"], about["columns"]
    with Image.open(ATLAS / f"{vendor}.png") as sheet:
        rgba = sheet.convert("RGBA")
    out = {}
    for i, row in enumerate(about["concepts"]):
        x, y = i % columns * cell, i // columns * cell
        out[row["label"]] = rgba.crop((x, y, x + cell, y + cell))
    return out


def drawing(vendor: str, label: str) -> Image.Image:
    """One vendor's drawing of a concept, RGBA."""
    return drawings(vendor)[label]


def draw(scene: Scene) -> Image.Image:
    """Draw a scene."""
    canvas = Image.fromarray(_ground(scene))
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        right, down, across, degrees = thing.jitter
        x, y = 40 + 80 * (thing.cell % 2) + right, 40 + 80 * (thing.cell // 2) + down
        pen.rounded_rectangle((x - 34, y - 34, x + 34, y + 34), radius=9, fill=TILES[thing.tile])
        pixels = SIZES[thing.size][0] + min(across, SIZES[thing.size][1] - SIZES[thing.size][0])
        turned = drawing(thing.vendor, thing.concept.label).rotate(TURNS[thing.turn] + degrees, Image.Resampling.BILINEAR)
        turned = turned.resize((pixels, pixels), Image.Resampling.BILINEAR)
        canvas.paste(turned, (x - pixels // 2, y - pixels // 2), turned)
    noise = np.random.default_rng(scene.seed).integers(-6, 7, (SIDE, SIDE, 1), dtype=np.int16)
    bright = np.asarray(canvas, dtype=np.float32) * scene.brightness + noise
    return Image.fromarray(bright.clip(0, 255).astype(np.uint8))


def _ground(scene: Scene) -> np.ndarray:
    """(160, 160, 3): the background colour, with a pattern of a lighter or darker shade."""
    colour = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    shade = colour * 0.80 if colour.mean() > 90 else colour + 34
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    is_drawn = {
        "plain": np.zeros_like(x, dtype=bool),
        "stripes": (x + y) // 8 % 2 == 0,
        "dots": (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 18,
        "checks": (x // 10 + y // 10) % 2 == 0,
    }[scene.pattern]
    return np.where(is_drawn[..., None], shade, colour).clip(0, 255).astype(np.uint8)
