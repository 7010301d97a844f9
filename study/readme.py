"""Rebuilds the generated blocks of README.md from the registry and from study/results; --check only compares.

    python -m study.readme [--check]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from htc_vlm import compressors
from study.generated import ROOT, check_or_write, with_blocks

RESULTS = ROOT / "study" / "results" / "tiny"
# Model -> its name in the table, in order; those without results are left out.
MODELS = {
    "tiny-upper": "uncompressed, 36 tokens",
    "tiny": "`tiny`: our best, one entry",
    "tiny-htc": "`tiny-htc`: the paper's HTC, one entry",
    "tiny-lower": "an untrained bottleneck",
}
SETS = {
    "pictograms-test": ("seen vendors", "score"),
    "pictograms-test-unseen": ("unseen vendor", "score"),
    "easy-vqa-test": ("easy-VQA", "score"),
    "fashion-mnist-test": ("Fashion-MNIST, open", "open"),
}


def result(model: str, task: str) -> dict[str, Any] | None:
    """One committed result file, None where there is none."""
    file = RESULTS / model / f"{task}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def results() -> str:
    """Right answers in percent: a line a model, and what answering without the picture gives."""
    lines = ["| | " + " | ".join(title for title, _ in SETS.values()) + " |", "|---|" + "---:|" * len(SETS)]
    rows = {name: {task: result(model, task) for task in SETS} for model, name in MODELS.items()}
    for name, files in rows.items():
        if any(files.values()):
            cells = ["" if file is None else f"{file['metrics'][SETS[task][1]]:.1f}" for task, file in files.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(files for files in rows.values() if all(files.values()))
    blind = [f"{file['baselines']['question only'][SETS[task][1]]:.1f}" for task, file in first.items() if file is not None]
    return "\n".join([*lines, "| *the question alone* | " + " | ".join(blind) + " |"])


def families(page: str) -> dict[str, str]:
    """Method -> where it works, from the table of docs/families.md (made from code); of several rows the widest.

    >>> families("| | A | B |\\n|---|---|---|\\n| x | works | works |\\n| y, in | works | [1] |\\n| y, after | works | works |")
    {'x': 'all 2', 'y': 'all 2'}
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    names, found = rows[0][1:], dict[str, list[str]]()
    for method, *cells in rows[2:]:
        works = [name for name, cell in zip(names, cells, strict=True) if cell == "works"]
        name = method.partition(",")[0].strip("`")
        found[name] = max(works, found.get(name, []), key=len)
    return {name: _told(works, names) for name, works in found.items()}


def _told(works: list[str], names: list[str]) -> str:
    """The shorter of "all N", "all but ..." and the names themselves."""
    without = [name for name in names if name not in works]
    if len(without) > len(works):
        return ", ".join(works)
    return "all but " + ", ".join(without) if without else f"all {len(names)}"


def methods() -> str:
    """A line a method, from the registry."""
    where = families((ROOT / "docs" / "families.md").read_text(encoding="utf-8"))
    lines = ["| method | source | acts | families | cached |", "|---|---|---|---|---|"]
    for name in compressors.names():
        cls = compressors.COMPRESSORS.get(name)
        path = "src/" + cls.__module__.replace(".", "/") + ".py"
        acts, cached = cls.ACTS.replace("the ", ""), "yes" if cls.QUESTION_INDEPENDENT else ""
        works = where.get(name, "its own model" if cls.TRAINED else "")
        lines.append(f"| [`{name}`]({path}) | {cls.PAPER} | {acts} | {works} | {cached} |")
    return "\n".join(lines)


BLOCKS = {"results": results, "methods": methods}


def files() -> dict[Path, str]:
    """README.md, its tables made anew."""
    return with_blocks(ROOT / "README.md", BLOCKS)


if __name__ == "__main__":
    raise SystemExit(check_or_write(files, __doc__))
