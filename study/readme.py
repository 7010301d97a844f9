"""Rebuild the measured parts of README.md (the picture and the blocks between markers) from results/; --check only compares.

    python study/readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "study" / "experiments"
RESULTS = ROOT / "study" / "results" / "tiny"
PICTURE = ROOT / "docs" / "assets" / "tiny.png"
KINDS = ("name", "category", "tile", "size", "turn", "on", "where", "beside", "exist", "count", "background")
ROWS = {"tiny-upper": "uncompressed, 36 tokens", "tiny": "HTC, 1 token", "tiny-lower": "lower bound, 1 token"}


def result(model: str, task: str) -> dict[str, Any]:
    """One committed result file."""
    return json.loads((RESULTS / model / f"{task}.json").read_text())


def table() -> str:
    """Accuracy in percent by kind of question, models and blind baselines side by side."""
    lines = []
    for split, title in (("pictograms-test", "seen vendors"), ("pictograms-test-unseen", "unseen vendor (Fluent 3D)")):
        files = {name: result(model, split) for model, name in ROWS.items()}
        some = next(iter(files.values()))
        columns = {name: file["metrics"] for name, file in files.items()}
        blind = some["baselines"]
        columns |= {"knows what, not where": blind["bag of things"], "question only": blind["question only"]}
        lines += [f"**{title}**, {some['n_questions']:,} questions about {some['n_images']:,} new scenes", ""]
        lines += ["| | " + " | ".join((*KINDS, "all")) + " |", "|---|" + "---:|" * (len(KINDS) + 1)]
        for name, metrics in columns.items():
            cells = [f"{metrics[kind]:.1f}" for kind in (*KINDS, "score")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def others() -> str:
    """easy-VQA and Fashion-MNIST."""
    lines = ["| | easy-VQA, official test | yes/no | open | Fashion-MNIST, open question |", "|---|---:|---:|---:|---:|"]
    for model, name in ROWS.items():
        if not (RESULTS / model / "easy-vqa-test.json").exists():
            continue
        easy, fashion = result(model, "easy-vqa-test"), result(model, "fashion-mnist-test")
        cells = [easy["metrics"]["score"], easy["metrics"]["yes/no"], easy["metrics"]["open"], fashion["metrics"]["open"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    easy, fashion = result("tiny", "easy-vqa-test"), result("tiny", "fashion-mnist-test")
    blind_easy, blind_fashion = easy["baselines"]["question only"], fashion["baselines"]["question only"]
    cells = [blind_easy["score"], blind_easy["yes/no"], blind_easy["open"], blind_fashion["open"]]
    lines.append("| question only | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    n_fashion = fashion["n_questions"] // 2
    n_easy = easy["n_questions"]
    lines += ["", f"easy-VQA: all {n_easy:,} questions. Fashion-MNIST: the first {n_fashion:,} official test pictures."]
    return "\n".join(lines)


def speed() -> str:
    """First-token time and cache size, from study/results/ask."""
    numbers = json.loads((ROOT / "study" / "results" / "ask" / "cpu.json").read_text())
    ms, kept = numbers["milliseconds"], numbers["cache_bytes_per_picture"]
    return (
        f"On {numbers['threads']} CPU cores, one run of `benchmarks/ask.py`, the first token takes {ms['text_only']:.1f} ms "
        f"without a picture, {ms['from_cache']:.1f} ms from the cache and {ms['uncompressed']:.1f} ms uncompressed: 36 patches "
        f"are few ([576 patches](docs/performance.md)). A picture is kept in {kept['compressed']:,} bytes instead of "
        f"{kept['uncompressed']:,}."
    )


def draw(file: Path) -> None:
    """Accuracy by kind of question on the seen vendors, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = {name: result(model, "pictograms-test") for model, name in ROWS.items()}
    baselines = files[ROWS["tiny"]]["baselines"]
    figure, axes = plt.subplots(figsize=(10, 3.9), layout="constrained")
    colours = dict(zip(ROWS.values(), ("#9fb8d4", "#1f5fa8", "#d0d4da"), strict=True))
    for i, (name, numbers) in enumerate(files.items()):
        heights = [numbers["metrics"][kind] for kind in KINDS]
        axes.bar([x + 0.27 * (i - 1) for x in range(len(KINDS))], heights, 0.26, color=colours[name], label=name)
    for x, kind in enumerate(KINDS):
        for key, style, label in (("bag of things", "-", "knows what, not where"), ("question only", ":", "question only")):
            axes.plot([x - 0.42, x + 0.42], [baselines[key][kind]] * 2, style, color="#c1440e", linewidth=1.4,
                      label=label if x == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(KINDS)), KINDS)
    title = "What one cached token keeps of a picture: new scenes, by kind of question"
    axes.set(ylim=(0, 101), ylabel="right answers, %", title=title)
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def methods() -> str:
    """The table of methods, from the registry."""
    from htc_vlm import compressors

    lines = ["| method | source | acts | needs training | question-independent | file |", "|---|---|---|---|---|---|"]
    for name in compressors.names():
        cls = compressors.COMPRESSORS.get(name)
        path = cls.__module__.replace(".", "/") + ".py"
        yes = {True: "yes", False: "no"}
        lines.append(
            f"| `{name}` | {cls.PAPER} | {cls.ACTS} | {yes[cls.TRAINED]} | {yes[cls.QUESTION_INDEPENDENT]} | "
            f"[{path.rsplit('/', 1)[1]}](src/{path}) |"
        )
    return "\n".join(lines)


def study() -> str:
    """What each method of Table 1 keeps, and the comparisons for which both rows have three seeds."""
    from study.definitions import read_tables
    from study.reading import no_better_than_blind, retained, short_grid
    from study.study_tables import load_table
    from study.tables import to_markdown

    studies = [load_table(name, EXPERIMENTS, RESULTS.parent) for name in read_tables(EXPERIMENTS)]
    kept = [line for line in retained(studies[0]) if line.startswith("Kept")] + no_better_than_blind(studies[0])
    sizes = ", ".join(f"{len(asked):,} on {name}" for name, asked in studies[0].questions.items() if name.startswith("pict"))
    told = f"Comparisons with three seeds on both sides, over all questions ({sizes}), 95 % intervals over pictures:"
    return "\n\n".join(["\n".join(f"- {line}" for line in kept), told, to_markdown(short_grid(studies, min_seeds=3))])


BLOCKS = {"table": table, "others": others, "speed": speed, "study": study, "methods": methods}


def rebuilt(text: str) -> str:
    """README text with every block between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no block <!-- {name} --> ... <!-- /{name} -->")
        content = make()
        text = pattern.sub(lambda match, content=content: match[1] + content + "\n" + match[2], text)
    return text


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = rebuilt(old)
    if arguments.parse_args().check:
        if new != old:
            print("README.md differs from results/; run study/readme.py", file=sys.stderr)
        return int(new != old)
    readme.write_text(new)
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
