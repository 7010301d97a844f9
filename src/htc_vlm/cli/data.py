"""`htc-vlm data NAME`: verify a data set offline, show its answer balance and blind baselines, write it for LLaVA.

Source:  sizes of the official splits: easy-vqa 1.0 (its wheel), Fashion-MNIST (Xiao et al. 2017, section 2). The
         written form is LLaVA's: one conversation JSON per split beside an image folder.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from PIL import Image

from htc_vlm.data.prompts import IMAGE
from htc_vlm.eval.task import HasBaselines, Item, make_task
from htc_vlm.files import write_new
from htc_vlm.tiny.questions import Question

MODULES = {"pictograms": "pictograms", "easy-vqa": "easy_vqa", "fashion-mnist": "fashion_mnist", "photo": "photo"}
SPLITS = {"pictograms": ("train", "val", "test", "test-unseen"), "photo": ("train", "val", "test", "photos")}
USUAL_SPLITS = ("train", "val", "test")

# (images, questions) of the official files. Fashion-MNIST has no questions of its own: ours are two for each image.
# train is counted with val, which is ours and cut from it.
OFFICIAL = {
    "easy-vqa": {"train": (4000, 38575), "test": (1000, 9673)},
    "fashion-mnist": {"train": (60000, 120000), "test": (10000, 20000)},
}


@dataclass(frozen=True)
class KindBalance:
    """One row of the table: a kind of question. Shares are percent."""

    n_questions: int
    n_answers: int
    commonest: str
    commonest_share: float
    baselines: Mapping[str, float]


def balance(questions: Sequence[Question], baselines: Mapping[str, Mapping[str, float]]) -> dict[str, KindBalance]:
    """How often each kind is asked and how its answers are spread; baselines are {name: {kind: percent}}.

    >>> asked = [Question(str(i), "p", "is it ?", answer, "exist") for i, answer in enumerate(("yes", "yes", "no"))]
    >>> balance(asked, {"majority": {"exist": 66.7}})["exist"].commonest
    'yes'
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][question.answer] += 1
    rows = {}
    for kind, counts in sorted(answers.items()):
        (commonest, n_commonest), n = counts.most_common(1)[0], counts.total()
        blind = {name: by_kind[kind] for name, by_kind in baselines.items()}
        rows[kind] = KindBalance(n, len(counts), commonest, 100 * n_commonest / n, blind)
    return rows


def table(rows: Mapping[str, KindBalance]) -> str:
    """The rows as aligned text."""
    names = list(next(iter(rows.values())).baselines)
    lines = [["kind", "questions", "answers", "commonest", *(f"{name} %" for name in names)]]
    for kind, row in rows.items():
        shares = [f"{row.baselines[name]:.1f}" for name in names]
        commonest = f"{row.commonest} {row.commonest_share:.1f} %"
        lines.append([kind, str(row.n_questions), str(row.n_answers), commonest, *shares])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def check_official(name: str, found: Mapping[str, tuple[int, int]]) -> None:
    """ValueError unless (images, questions) by split, val counted under train, are the official ones."""
    wanted = OFFICIAL[name]
    if dict(found) != wanted:
        raise ValueError(
            f"these are not the official files of {name}: (images, questions) are {dict(found)}, official {wanted}; "
            "fetch the package again"
        )


def check_questions(dataset: ModuleType, questions: Sequence[Question]) -> None:
    """ValueError on an id used twice, or a word that the word tokenizer would not know (of sets that are made for it)."""
    twice = [id for id, n in Counter(question.id for question in questions).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} question ids are used twice, {twice[0]!r} first")
    if not hasattr(dataset, "vocabulary"):
        return
    known = set(dataset.vocabulary())
    for question in questions:
        unknown = set(question.text.split()) | {question.answer}
        if not unknown <= known:
            raise ValueError(f"{question.id}: words outside the vocabulary: {', '.join(sorted(unknown - known))}")


def conversation(image_id: str, questions: Sequence[Question]) -> dict[str, object]:
    """One sample in LLaVA's form; the picture belongs to the first turn.

    >>> sample = conversation("val/3", [Question("q", "val/3", "is it red ?", "yes", "colour")])
    >>> sample["image"], sample["conversations"][0]
    ('val/3.png', {'from': 'human', 'value': '<image>\\nis it red ?'})
    """
    turns: list[dict[str, str]] = []
    for question in questions:
        text = question.text if turns else f"{IMAGE}\n{question.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return {"id": image_id, "image": f"{image_id}.png", "conversations": turns}


def write_split(dataset: ModuleType, questions: Sequence[Question], out: Path, split: str, force: bool = False) -> Path:
    """Write OUT/images/ID.png for every image asked about, then OUT/SPLIT.json; returns the JSON's path.

    ValueError where another file is in the place of one, unless `force`; the same file is left as it is.
    """
    by_image: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[question.image].append(question)
    for image_id in by_image:
        file = out / "images" / f"{image_id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        png = io.BytesIO()
        dataset.picture(image_id).save(png, format="PNG")
        write_new(file, png.getvalue(), force)
    samples = [conversation(image_id, rows) for image_id, rows in by_image.items()]
    write_new(out / f"{split}.json", (json.dumps(samples, indent=1) + "\n").encode(), force)
    return out / f"{split}.json"


def check_pictures(dataset: ModuleType, image_ids: Sequence[str]) -> None:
    """Open every picture; ValueError names the first that is no RGB picture, or that cannot be read."""
    for image_id in image_ids:
        try:
            picture: Image.Image = dataset.picture(image_id)
        except OSError as error:
            raise ValueError(f"picture {image_id}: {error}") from error
        if picture.mode != "RGB":
            raise ValueError(f"picture {image_id} is {picture.mode}, not RGB")


def blind(name: str, split: str, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Blind baselines in percent, {baseline: {kind: ...}}, by the code that `htc-vlm eval` reports; none for train."""
    if split == "train":
        return {}
    items = [Item(q.id, q.image, lambda: Image.new("RGB", (1, 1)), q.text, q) for q in questions]
    task = make_task(name)
    if not isinstance(task, HasBaselines):
        raise ValueError(f"task {name} knows no blind baselines")
    return task.baselines(items)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="htc-vlm data", description=run.__doc__)
    parser.add_argument("name", choices=tuple(MODULES), help="which data set")
    parser.add_argument("--data", type=Path, help="folder with the official files (default: $HTC_VLM_DATA)")
    parser.add_argument("--out", type=Path, help="write SPLIT.json (LLaVA conversations) and images/ here")
    parser.add_argument("--force", action="store_true", help="replace other files in --out")
    parser.add_argument("--limit", type=int, metavar="N", help="open, show and write the first N images of each split")
    return parser


def run(argv: list[str]) -> int:
    """Verify a data set offline: counts, every picture, the balance of answers, and what answering blind gives."""
    args = _parser().parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is a number of images, 1 or more; got {args.limit}")
    if args.data is not None:
        os.environ["HTC_VLM_DATA"] = str(args.data)  # where our own sets look for their files
    dataset = import_module(f"htc_vlm.tiny.{MODULES[args.name]}")
    if hasattr(dataset, "prepare"):
        print(dataset.prepare(), flush=True)
    splits = SPLITS.get(args.name, USUAL_SPLITS)
    asked: dict[str, list[Question]] = {split: dataset.questions(split) for split in splits}
    if args.name in OFFICIAL:
        sizes = {split: (len({q.image for q in rows}), len(rows)) for split, rows in asked.items()}
        train, val = sizes["train"], sizes["val"]
        check_official(args.name, {"train": (train[0] + val[0], train[1] + val[1]), "test": sizes["test"]})
        print(f"{args.name}: the official files, {len(dataset.vocabulary())} words")
    check_questions(dataset, [question for questions in asked.values() for question in questions])
    for split, questions in asked.items():
        kept = list(dict.fromkeys(question.image for question in questions))[: args.limit]
        wanted = set(kept)
        shown = [question for question in questions if question.image in wanted]
        check_pictures(dataset, kept)
        print(f"\n{split}: {len(kept)} images, {len(shown)} questions")
        print(table(balance(shown, blind(args.name, split, shown))))
        if args.out is not None:
            print(f"wrote {write_split(dataset, shown, args.out, split, args.force)}")
    return 0
