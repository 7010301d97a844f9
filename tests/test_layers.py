"""The imports of src/htc_vlm point strictly down (design.md, section 3)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "htc_vlm"

HEIGHTS = {
    "tokens": 0, "registry": 0, "settings": 0, "files": 0,
    "ops": 1, "quantizers": 1,
    "compressors": 2, "data": 2, "convert": 2,
    "applied": 3, "tiny": 3,
    "model": 4,
    "store": 5, "train": 5, "eval": 5, "viz": 5,
    "batch": 6, "serve": 6, "testing": 6,
    "cli": 7,
    "__init__": 8,  # the public names, lazily; only commands may import them
}  # fmt: skip

# file or folder -> packages that must not be imported there
BANNED = {
    "tokens.py": {"transformers", "diffusers"},
    "registry.py": {"torch", "transformers", "diffusers"},
    "ops": {"transformers", "diffusers"},
    "eval/score.py": {"torch", "transformers", "numpy"},
}


def imported_modules(source: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in the source, also inside functions; relative ones resolved."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from htc_vlm import data` imports the folder data; `from htc_vlm import load` a public name.
            found += [(node.lineno, f"{module}.{alias.name}" if module == "htc_vlm" else module)
                      for alias in node.names]  # fmt: skip
    return found


def part_of(module: str) -> str | None:
    """The top-level part of our package that a module belongs to; None for foreign modules.

    >>> part_of("htc_vlm.ops.masks"), part_of("htc_vlm.load"), part_of("torch.nn")
    ('ops', '__init__', None)
    """
    names = module.split(".")
    if names[0] != "htc_vlm":
        return None
    return names[1] if len(names) > 1 and names[1] in HEIGHTS else "__init__"


def violations(source: str, file: str) -> list[str]:
    """What is wrong with the imports of one file, given by its path below the package."""
    path = Path(file)
    here = path.parts[0].removesuffix(".py")
    if here not in HEIGHTS:
        return [f"{file}: {here!r} has no height; add it to HEIGHTS in tests/test_layers.py"]
    banned = set().union(*(names for place, names in BANNED.items() if path.is_relative_to(place)))
    wrong = []
    for line, module in imported_modules(source, ("htc_vlm", *path.parts[:-1])):
        there = part_of(module)
        if module.split(".")[0] in banned:
            wrong.append(f"{file}:{line}: must not import {module}")
        if there is not None and there != here and HEIGHTS[there] >= HEIGHTS[here] and here != "cli":
            direction = "sideways" if HEIGHTS[there] == HEIGHTS[here] else "up"
            wrong.append(f"{file}:{line}: {here} imports {module}, which points {direction}")
    return wrong


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file: str) -> None:
    """nanoVLM's models import its data (vision_language_model.py:14): nothing there can be used alone."""
    assert violations((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("ops/masks.py", "def f():\n    from htc_vlm.eval import run", "points up"),
        ("convert/mgvq.py", "from htc_vlm.data import collate", "points sideways"),
        ("convert/mgvq.py", "from ..data.collate import X", "points sideways"),
        ("train/loop.py", "from htc_vlm import load", "points up"),
        ("model/a.py", "from htc_vlm import cli", "points up"),
        ("ops/masks.py", "import transformers.masking_utils", "must not import"),
        ("eval/score.py", "import torch", "must not import"),
        ("newcomer/a.py", "", "has no height"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str, expected: str) -> None:
    """A checker that never fails is no checker."""
    assert any(expected in line for line in violations(source, file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli/ask.py", "from htc_vlm import load"),
        ("data/collate.py", "from .conversations import Encoded\nfrom htc_vlm.tokens import TokenLayout"),
        ("compressors/htc.py", "import torch\nfrom htc_vlm.ops.masks import visible"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    """Relative imports inside one folder and imports of lower folders are what the layers are for."""
    assert violations(source, file) == []
