"""Python processes of tests: killed at a call that they reach themselves, and waited for as long as a busy machine needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

PATIENCE_S = 1800  # a second of work can take a minute where ten processes share a core
DIES_AT = """
import importlib, os, signal
def dies_at(module, name, call):
    owner, calls = importlib.import_module(module), []
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(owner, last, counted)
"""


def run_code(code: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The finished process of `python -c code arguments`. path: a folder to import from."""
    environment = None if path is None else os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)


def killed_at(target: str, call: int, code: str, *arguments: str, path: Path | None = None) -> None:
    """Runs `python -c code arguments` until the `call`-th call (from 1) of target, "module:name", where it gets SIGKILL.

    Watching from outside would let a fast child end before it is killed, on a machine that runs other things.
    """
    module, _, name = target.partition(":")
    start = f"{DIES_AT}\ndies_at({module!r}, {name!r}, {call})\n"
    done = run_code(start + code, *arguments, path=path)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
