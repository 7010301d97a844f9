"""The imports of src/htc_vlm point strictly down (docs/design.md), and no command imports torch to print its help."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
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
    "settings.py": {"torch", "transformers", "diffusers", "numpy"},
    "ops": {"transformers", "diffusers"},
    "eval/score.py": {"torch", "transformers", "numpy"},
}
SLOW = {"torch", "transformers", "diffusers"}  # what `htc-vlm COMMAND --help` must not import


@dataclass(frozen=True)
class Import:
    """One import. module: absolute; None where a call of import_module computes it. late: inside a function."""

    line: int
    module: str | None
    late: bool = False


@cache
def imports(source: str, package: tuple[str, ...]) -> list[Import]:
    """Every import of the source: statements, import_module and __import__, also inside functions."""
    tree = ast.parse(source)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)}
    # `if TYPE_CHECKING:` costs no time, but its imports must point down like all others.
    late |= {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
             for statement in node.body for inner in ast.walk(statement)}  # fmt: skip
    return [
        Import(node.lineno, module, id(node) in late)
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)
        for module in modules_of(node, package)
    ]  # fmt: skip


def modules_of(node: ast.Import | ast.ImportFrom | ast.Call, package: tuple[str, ...]) -> list[str | None]:
    """The absolute names that a node imports; relative ones resolved; none for other calls."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        module = ".".join(part for part in (base, node.module) if part)
        # `from htc_vlm import data` imports the folder data; `from htc_vlm import load` a public name.
        return [f"{module}.{alias.name}" if module == "htc_vlm" else module for alias in node.names]
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called not in ("import_module", "__import__") or not node.args:
        return []
    return [computed_name(node.args[0], ".".join(package))]


def computed_name(argument: ast.expr, package: str) -> str | None:
    """The module that import_module is given, up to its first computed part; None where nothing of it is written out.

    >>> [computed_name(ast.parse(text).body[0].value, "htc_vlm.eval") for text in ("'a.b'", "f'htc_vlm.tiny.{x}'", "name")]
    ['a.b', 'htc_vlm.tiny', None]
    """
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    known = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            known += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) in ("__name__", "__package__") and not known:
            known = package
        else:
            break
    return known.rstrip(".") or None


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
    for found in imports(source, ("htc_vlm", *path.parts[:-1])):
        where = f"{file}:{found.line}"
        if found.module is None:
            wrong.append(f"{where}: a computed import; write the package out, as in import_module(f'htc_vlm.tiny.{{name}}')")
            continue
        there = part_of(found.module)
        if found.module.split(".")[0] in banned:
            wrong.append(f"{where}: must not import {found.module}")
        may_import_names = here == "cli" and there == "__init__"
        if there is not None and there != here and HEIGHTS[there] >= HEIGHTS[here] and not may_import_names:
            direction = "sideways" if HEIGHTS[there] == HEIGHTS[here] else "up"
            wrong.append(f"{where}: {here} imports {found.module}, which points {direction}")
    return wrong


FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def early_imports(module: str) -> frozenset[str]:
    """What importing one of our modules imports at once, its packages included; foreign names by their first part."""
    base = module.replace(".", "/").removeprefix("htc_vlm/")
    file = next((name for name in (f"{base}.py", f"{base}/__init__.py") if name in FILES), None)
    if file is None or module == "htc_vlm":
        return frozenset()
    package = ("htc_vlm", *Path(file).parts[:-1])
    names = set()
    for found in imports(FILES[file], package):
        if found.module is None or found.late:
            continue
        names.add(found.module if found.module.startswith("htc_vlm") else found.module.split(".")[0])
    parents = {module.rsplit(".", n)[0] for n in range(1, module.count("."))}
    return frozenset(names | parents)


def slow_import(module: str, seen: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The chain of imports by which a module brings in one of SLOW; None where it does not."""
    for name in sorted(early_imports(module)):
        if name in SLOW:
            return (*seen, module, name)
        if name.startswith("htc_vlm") and name not in (*seen, module):
            chain = slow_import(name, (*seen, module))
            if chain is not None:
                return chain
    return None


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A circle of a graph, or None.

    >>> circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}), circle({"a": {"b"}, "b": set()})
    (['b', 'c'], None)
    """
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return trail[trail.index(node) :]
        if node in done:
            return None
        for other in sorted(graph.get(node, ())):
            found = visit(other, [*trail, node])
            if found is not None:
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := visit(node, [])) is not None), None)


def test_imports_point_down() -> None:
    """nanoVLM's models import its data (vision_language_model.py:14): nothing there can be used alone."""
    assert [line for file, source in FILES.items() for line in violations(source, file)] == []


def test_no_circle_between_files() -> None:
    """Two files of one room that import each other at their top work in one order of imports and fail in the other."""
    modules = {f"htc_vlm.{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for name in FILES}
    rooms = {module.rsplit(".", 1)[0] for module in modules}  # a package's face imports its files: that is no circle
    graph = {module: {name for name in early_imports(module) if name in modules - rooms} for module in modules - rooms}
    assert circle(graph) is None


def test_no_command_imports_torch_for_its_help() -> None:
    """`htc-vlm ask --help` took six seconds. Import inside run(), not at a command's top."""
    commands = [f"htc_vlm.cli.{Path(name).stem}" for name in FILES if name.startswith("cli/")]
    assert [" -> ".join(chain) for name in commands if (chain := slow_import(name)) is not None] == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("ops/masks.py", "def f():\n    from htc_vlm.eval import run", "points up"),
        ("convert/llava_original.py", "from htc_vlm.data import collate", "points sideways"),
        ("convert/llava_original.py", "from ..data.collate import X", "points sideways"),
        ("train/loop.py", "from htc_vlm import load", "points up"),
        ("model/a.py", "from htc_vlm import cli", "points up"),
        ("compressors/__init__.py", "import importlib\ndef f():\n    importlib.import_module('htc_vlm.model.x')", "points up"),
        ("ops/masks.py", "from importlib import import_module\nimport_module(f'htc_vlm.tiny.{name}')", "points up"),
        ("ops/masks.py", "__import__('htc_vlm.eval')", "points up"),
        ("eval/task.py", "import_module(f'{package.__name__}.{name}')", "a computed import"),
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
        ("compressors/__init__.py", "import importlib\nimportlib.import_module(f'{__name__}.{name}')"),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    """Relative imports inside one folder and imports of lower folders are what the layers are for."""
    assert violations(source, file) == []
