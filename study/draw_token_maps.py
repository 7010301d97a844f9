"""Redraw the pictures of docs/assets/token_maps with the shipped `tiny-upper`.

    python -m study.draw_token_maps
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from htc_vlm.cli import token_map

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "assets" / "token_maps"
PICTURES: dict[str, tuple[str, ...]] = {
    "tome": ("coffee.jpg", "--budget", "12", "--set", "place=after_tower", "--set", "metric=features"),
    "fastv": ("chelsea.jpg", "--set", "n_keep=12", "--set", "layer=2", "--question", "is there a mammal ?"),
    "sparse_vlm": (
        "chelsea.jpg", "--set", "layers=[0, 2]", "--set", "keep=[16, 8]", "--question", "is there a mammal ?",
    ),
    "pyramid_drop": ("scene.png", "--budget", "12", "--question", "what is at the bottom left ?"),
}  # fmt: skip


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for method, (picture, *options) in PICTURES.items():
        file = FOLDER / f"{method}.png"
        token_map.run(
            [str(ROOT / "examples" / "pictures" / picture), "--method", method, *options, "--output", str(file)]
        )
        with Image.open(file) as drawn:
            small = drawn.convert("RGB").quantize(256)  # a third of the bytes
        small.save(file, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
