"""`make demo`: compress two scenes into one cache entry each, ask ten questions, show which answers are right and the map.

The scenes and questions were chosen before the shipped model was trained, and are in no training data. The first scene is
drawn by vendors seen in training, the second by one that was not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from htc_vlm import load
from htc_vlm.cli import ask
from htc_vlm.model.answering import Answerer
from htc_vlm.tiny import pictograms
from htc_vlm.viz import attention_map

SCENES = {  # scene: question: the right answer
    "test/0": {
        "what is at the top left ?": "carrot",
        "what colour is behind the owl ?": "yellow",
        "where is the spider ?": "top-right",
        "what is on the tile in green ?": "mushroom",
        "how many things are there ?": "four",
    },
    "test-unseen/0": {
        "what is at the bottom right ?": "camel",
        "where is the trumpet ?": "bottom-left",
        "what colour is behind the top left ?": "yellow",
        "how big is the bottom left ?": "big",
        "what pattern is the background ?": "dots",
    },
}
DRAWN_BY = {"test/0": "vendors seen in training", "test-unseen/0": "a vendor never seen in training"}


def answers(answerer: Answerer) -> dict[str, list[tuple[str, str, bool]]]:
    """Each scene's (question, answer, is it right?), all asked of compressed scenes."""
    encoded = answerer.encode([pictograms.picture(scene) for scene in SCENES])
    out = {}
    for number, (scene, asked) in enumerate(SCENES.items()):
        given = answerer.ask(encoded, [number] * len(asked), list(asked), max_new_tokens=4)
        out[scene] = [(q, a, a == right) for (q, right), a in zip(asked.items(), given, strict=True)]
    return out


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = arguments.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model, processor = load("tiny")
    answerer = Answerer(model, processor)
    pictures, names = [pictograms.picture(scene) for scene in SCENES], [scene.replace("/", "-") for scene in SCENES]
    n_right, n_asked = 0, 0
    for picture, name, (scene, rows) in zip(pictures, names, answers(answerer).items(), strict=True):
        picture.save(out / f"{name}.png")
        print(f"\n{out / name}.png, drawn by {DRAWN_BY[scene]}")
        for question, answer, is_right in rows:
            mark = "right" if is_right else f"WRONG, it is {SCENES[scene][question]}"
            print(f"  {question:<40} {answer:<12} {mark}")
            n_right, n_asked = n_right + is_right, n_asked + 1
    attention_map.draw(model, processor, pictures, names, out / "attention.png")
    print(f"\n{n_right} of {n_asked} answers are right. What the bottleneck looked at: {out / 'attention.png'}\n")
    cost = ask.measure(answerer, pictures[0], "what is at the top left ?", max_new_tokens=4)
    print(f"{'one scene':<14} {'cache entries':>14} {'bytes':>9} {'encode ms':>10} {'first token ms':>15}")
    for name, row in cost.items():
        print(
            f"{name:<14} {row['cached_tokens']:>14} {row['cache_bytes']:>9,} {row['encode_ms']:>10.1f} "
            f"{row['first_token_ms']:>15.1f}"
        )
    serve = f"{Path(sys.executable).parent / 'htc-vlm'} serve --store {out / 'album'}"
    print(f"\nAsk on a page, about pictures of your own choice: {serve}    # then open http://127.0.0.1:8000/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
