"""Where a result comes from: commit, dirty flag, command, package versions.

Source:  the result files of huggingface/peft method_comparison.
Differs: nothing known.
"""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("htc-vlm", "torch", "transformers", "diffusers", "vector-quantize-pytorch", "pillow", "numpy")


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parent
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _portable(word: str) -> str:
    """An absolute path as one from the working directory, or by its last two parts: results are shared, folders are not.

    >>> _portable("--limit=20"), _portable("/home/me/runs/tiny/model"), _portable(str(Path.cwd() / "runs"))
    ('--limit=20', '.../tiny/model', 'runs')
    """
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(Path.cwd())
    return option + equals + str(path.relative_to(Path.cwd()) if inside else Path("...", *path.parts[-2:]))


def provenance() -> dict[str, Any]:
    """commit and dirty (None outside a checkout of this library, and without git; untracked files do not count), command,
    versions."""
    is_ours = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None  # not a project with this in its .venv
    status = _git("status", "--porcelain", "--untracked-files=no") if is_ours else None
    return {
        "commit": _git("rev-parse", "HEAD") if is_ours else None,
        "dirty": None if status is None else bool(status),
        "command": shlex.join([Path(sys.argv[0]).name, *map(_portable, sys.argv[1:])]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }
