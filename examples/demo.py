"""`make demo`: compress two pictures into one cached token each, ask five questions about each, draw what was looked at."""

from __future__ import annotations

import argparse
from pathlib import Path

from htc_vlm.cli import ask

HERE = Path(__file__).parent / "pictures"
QUESTIONS = {  # question: the right answer
    "scene.png": {
        "what pattern is the background ?": "dots",
        "what colour is the background ?": "brown",
        "how many things are there ?": "four",
        "what is at the top left ?": "sunflower",
        "what colour is behind the bottom left ?": "purple",
    },
    "chelsea.jpg": {
        "is there a cat ?": "yes",
        "is there a mammal ?": "yes",
        "how many things are there ?": "one",
        "what colour is the background ?": "brown",
        "is there a vehicle ?": "no",
    },
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = arguments.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, questions in QUESTIONS.items():
        picture = out / f"{Path(name).stem}-attention.png"
        ask.run([str(HERE / name), *questions, "--verbose", "--heatmap", str(picture)])
        print(f"  right would be: {', '.join(questions.values())}")
        print(f"  attention of the bottleneck token: {picture}\n")
    print("The photo is unlike all that the tiny model has seen (pictograms, shapes, small grey clothes): expect guesses.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
