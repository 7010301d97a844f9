"""`make demo`: compress two pictures into one cached token each, ask five questions about each, draw what was looked at."""

from __future__ import annotations

import argparse
from pathlib import Path

from htc_vlm.cli import ask

HERE = Path(__file__).parent / "pictures"
QUESTIONS = {
    "scene.png": [
        "what is at the top left ?",
        "what kind of thing is at the top right ?",
        "what colour is behind the bottom left ?",
        "is there a mammal ?",
        "what pattern is the background ?",
    ],
    "chelsea.jpg": [
        "is there a cat ?",
        "is there a mammal ?",
        "how many things are there ?",
        "what kind of thing is at the top left ?",
        "is there a vehicle ?",
    ],
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = arguments.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, questions in QUESTIONS.items():
        picture = out / f"{Path(name).stem}-attention.png"
        ask.run([str(HERE / name), *questions, "--verbose", "--heatmap", str(picture)])
        print(f"  attention of the bottleneck token: {picture}\n")
    print("The photo is unlike all that the tiny model has seen (pictograms, shapes, small grey clothes): expect guesses.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
