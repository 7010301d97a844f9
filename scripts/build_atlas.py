"""Build the pictogram atlas: one PNG per vendor and concepts.json, committed in src/htc_vlm/tiny/atlas/.

Source: npm packages @lobehub/fluent-emoji-3d 1.1.0, emoji-datasource-twitter 16.0.0 and emojibase-data 17.0.0; Debian
    package fonts-noto-color-emoji 2.042. Names are the English CLDR short names, as emojibase-data gives them.
Differs: pictures are cropped to what is drawn, scaled so that the longer side fills 72 pixels, and centred.

Only one-word CLDR labels are used. Category words are ours, each made of whole CLDR subgroups (see CATEGORIES).
Unpack the packages first (FOLDER/fluent/package, FOLDER/twitter/package, FOLDER/base/package, FOLDER/noto/usr), then:

    python scripts/build_atlas.py FOLDER [--sheet SHEET.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 72
COLUMNS = 12
NOTO_PIXELS = 109  # the only bitmap size in the font
VENDORS = ("noto", "twemoji", "fluent")
ATLAS = Path(__file__).resolve().parents[1] / "src" / "htc_vlm" / "tiny" / "atlas"

# category -> (concepts that may be turned, concepts always drawn upright: they look much alike when turned, or the
# vendors draw them at different angles, so that "which way up" has no answer)
CATEGORIES: dict[str, tuple[str, str]] = {
    "mammal": ("elephant giraffe camel cat pig gorilla zebra rabbit", ""),
    "bird": ("penguin owl flamingo peacock parrot swan rooster duck", ""),
    "bug": ("snail ant cricket butterfly worm honeybee", "spider scorpion"),
    "plant": ("rose tulip cactus seedling mushroom", "sunflower shamrock hibiscus"),
    "fruit": ("pineapple pear strawberry grapes", "watermelon lemon banana coconut"),
    "vegetable": ("broccoli garlic onion", "avocado eggplant potato carrot cucumber"),
    "dish": ("hamburger sandwich popcorn pancakes taco", "pizza pretzel sushi"),
    "vehicle": ("bus ambulance tractor motorcycle bicycle sailboat", "airplane rocket"),
    "building": ("castle church mosque hotel factory stadium hut school", ""),
    "clothing": ("necktie jeans scarf coat dress shorts socks", "gloves"),
    "instrument": ("saxophone accordion drum trumpet", "guitar violin banjo flute"),
    "tool": ("ladder toolbox shield", "hammer axe wrench screwdriver magnet"),
}


def key(hexcode: str) -> str:
    """The file stem without the variation selector, which the packages write or leave out as they like."""
    return hexcode.lower().replace("-fe0f", "")


def concepts(folder: Path) -> list[dict[str, str | bool]]:
    """One row per concept, in the order of CATEGORIES; raises KeyError where CLDR has no such one-word label."""
    package = folder / "base" / "package"
    groups = json.loads((package / "meta" / "groups.json").read_text("utf-8"))
    by_label = {row["label"]: row for row in json.loads((package / "en" / "data.json").read_text("utf-8"))}
    rows: list[dict[str, str | bool]] = []
    for category, (turning, still) in CATEGORIES.items():
        for label in turning.split() + still.split():
            emoji = by_label[label]
            rows.append(
                {
                    "label": label,
                    "category": category,
                    "codepoint": key(emoji["hexcode"]),
                    "cldr_subgroup": groups["subgroups"][str(emoji["subgroup"])],
                    "turns": label in turning.split(),
                }
            )
    return rows


def find(folder: Path, codepoint: str, suffix: str) -> Path:
    """The package's file for a code point, with or without its variation selector."""
    for stem in (codepoint, f"{codepoint}-fe0f"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise FileNotFoundError(f"no {codepoint}{suffix} in {folder}")


def drawing(folder: Path, vendor: str, codepoint: str) -> Image.Image:
    """The vendor's picture as it comes, RGBA."""
    if vendor == "fluent":
        return Image.open(find(folder / "fluent" / "package" / "assets", codepoint, ".webp")).convert("RGBA")
    if vendor == "twemoji":
        return Image.open(find(folder / "twitter/package/img/twitter/64", codepoint, ".png")).convert("RGBA")
    font = ImageFont.truetype(str(folder / "noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), NOTO_PIXELS)
    picture = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(picture).text((8, 8), chr(int(codepoint, 16)), font=font, embedded_color=True)
    return picture


def fitted(picture: Image.Image) -> Image.Image:
    """Cropped to what is drawn, longer side CELL pixels, centred on a transparent square; colours premultiplied while
    resizing so that no dark rim appears."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None:
        raise ValueError("an empty picture")
    picture = picture.crop(box).convert("RGBa")
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (CELL, CELL))
    square.paste(small, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return square


def packed(cells: list[Image.Image]) -> Image.Image:
    """All cells of one vendor, row by row, COLUMNS a row."""
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return sheet


def contact_sheet(rows: list[dict[str, str | bool]], cells: dict[str, list[Image.Image]]) -> Image.Image:
    """Every concept with its name and its three drawings side by side, to be looked at."""
    width, height, per_row = 3 * CELL + 12, CELL + 16, 6
    sheet = Image.new("RGB", (per_row * width, -(-len(rows) // per_row) * height), "#c8d0d8")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = i % per_row * width, i // per_row * height
        pen.text((x + 4, y), f"{row['label']} ({row['category']}){'' if row['turns'] else ' still'}", fill="black")
        for j, vendor in enumerate(VENDORS):
            sheet.paste(cells[vendor][i], (x + j * (CELL + 2), y + 14), cells[vendor][i])
    return sheet


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Build the pictogram atlas from the unpacked packages.")
    parser.add_argument("folder", type=Path, help="holds fluent/, twitter/, base/ (npm) and noto/ (Debian), unpacked")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet here")
    parser.add_argument("--out", type=Path, default=ATLAS)
    args = parser.parse_args(argv)
    rows = concepts(args.folder)
    cells = {v: [fitted(drawing(args.folder, v, str(row["codepoint"]))) for row in rows] for v in VENDORS}
    args.out.mkdir(parents=True, exist_ok=True)
    for vendor in VENDORS:
        packed(cells[vendor]).save(args.out / f"{vendor}.png", optimize=True)
    about = {"cell": CELL, "columns": COLUMNS, "vendors": list(VENDORS), "concepts": rows}
    (args.out / "concepts.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    if args.sheet is not None:
        contact_sheet(rows, cells).save(args.sheet)
    print(f"{len(rows)} concepts, {len(CATEGORIES)} categories -> {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
