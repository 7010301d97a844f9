"""`htc-vlm COMMAND ...`: finds the command's file in htc_vlm/cli, runs it, and turns a refusal into one line.

Source:  ours.
Differs: nothing known.

A command is `cli/NAME.py` (with _ for -) with `run(argv: list[str]) -> int`. Nothing is imported before the command is
known, and a command imports torch inside `run`, after its arguments are parsed: `htc-vlm --help` and `htc-vlm ask --help`
answer at once (which is why this file stands outside the package: importing `htc_vlm` registers the model with transformers,
unless a command does it). Set HTC_VLM_DEBUG=1 to see the traceback of a refusal.

Exit codes: 0 done, 1 partly done (some pictures or tasks were refused), 2 refused, 70 a bug, 130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "ask": "ask questions about pictures, each squeezed into one cached token",
    "compress": "compress pictures into a file that questions can be asked of later",
    "store": "keep compressed pictures on disk: add, get, list, remove, verify, compact, merge, export",
    "batch": "ask many questions about many pictures, on this machine or on Ray",
    "data": "build or verify a data set, offline",
    "train": "train a stage of a preset; start again to resume",
    "eval": "answer a task's questions and write a result file",
    "compare": "compare two results on the same questions, with intervals",
    "convert": "turn LLaVA and MGVQ checkpoints into an HTC-VLM checkpoint",
    "heatmap": "draw what the bottleneck token looked at",
    "token-map": "draw which patch went into which token",
    "cost": "count tokens, FLOPs and bytes of a method",
    "serve": "answer questions over HTTP: an OpenAI-compatible server and its page",
}

MOVED = {
    "train-and-eval": "it is a command of the study now: in a source checkout, `python -m study train-and-eval`",
    "table": "it is a command of the study now: in a source checkout, `python -m study table`",
    "probe": "it is a command of the study now: in a source checkout, `python -m study probe`",
    "provenance": "it is called `htc-vlm token-map` now",
}

# Exit codes of all commands: 0 done; 1 partly done (some pictures or tasks were refused and named on stderr, or the
# reader of the output went away); 2 refused, nothing was done; 70 a bug, with its traceback; 130 interrupted.
EXIT_PARTLY = 1
EXIT_REFUSED = 2
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
is_running = False  # tells the package that a command imports it, which then leaves torch for later


def available() -> dict[str, str]:
    """Name -> summary of the commands whose file exists, in the order of COMMANDS."""
    folder = Path(__file__).parent / "htc_vlm" / "cli"
    return {name: summary for name, summary in COMMANDS.items() if (folder / f"{module(name)}.py").is_file()}


def module(name: str) -> str:
    """The file of a command: `train-and-eval` -> `train_and_eval`."""
    return name.replace("-", "_")


def usage(commands: dict[str, str]) -> str:
    """What `htc-vlm --help` prints.

    >>> print(usage({"ask": "ask a question", "data": "build a data set"}))
    usage: htc-vlm COMMAND [ARGUMENTS]
    <BLANKLINE>
      ask   ask a question
      data  build a data set
    <BLANKLINE>
    htc-vlm COMMAND --help tells the arguments of one command; htc-vlm --version the version.
    Exit codes: 0 done, 1 partly done, 2 refused.
    """
    width = max(map(len, commands), default=0)
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in commands.items())
    return (
        f"usage: htc-vlm COMMAND [ARGUMENTS]\n\n{rows}\n\n"
        "htc-vlm COMMAND --help tells the arguments of one command; htc-vlm --version the version.\n"
        "Exit codes: 0 done, 1 partly done, 2 refused."
    )


def one_line(error: Exception) -> str:
    """The message of a refusal on one line; the operating system's errors as "path: what is wrong".

    >>> one_line(FileNotFoundError(2, "No such file or directory", "cat.png"))
    'cat.png: No such file or directory'
    >>> one_line(ValueError("n_keep is 0;\\n  give at least 1"))
    'n_keep is 0; give at least 1'
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def unknown(name: str, commands: dict[str, str]) -> str:
    """The message for a command that does not exist.

    >>> unknown("akk", {"ask": "", "data": ""})
    "htc-vlm: no command 'akk'; did you mean 'ask'? Commands: ask, data"
    """
    import difflib

    near = difflib.get_close_matches(name, commands, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"htc-vlm: no command {name!r};{hint} Commands: {', '.join(commands)}"


def script() -> int:
    """The console script: `main` under any locale; a bug shows its traceback and exits with 70, not with "partly done"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII locale: a question or an answer may hold any letter
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except Exception:
        import traceback

        traceback.print_exc()
        return EXIT_BUG


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 partly done, 2 refused, 130 interrupted."""
    global is_running
    is_running = True
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = available()
    if not arguments:
        print(usage(commands), file=sys.stderr)
        return EXIT_REFUSED
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(usage(commands))
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"htc-vlm {version('htc-vlm')}")
        return 0
    if name in MOVED:
        print(f"htc-vlm {name}: {MOVED[name]}", file=sys.stderr)
        return EXIT_REFUSED
    if name not in commands:
        print(unknown(name, commands), file=sys.stderr)
        return EXIT_REFUSED
    return run_command(name, rest)


def run_command(name: str, argv: list[str]) -> int:
    """Imports `cli/NAME.py` and runs it as `run_module` does."""
    return run_module(f"htc_vlm.cli.{module(name)}", name, argv)


def run_module(path: str, name: str, argv: list[str]) -> int:
    """Runs the command in a module; a refusal becomes one line on stderr and exit code 2.

    Refusals are ValueError, OSError, and an ImportError raised by hand to say what to install. One of Python's own has
    a `name`, and is a bug.
    """
    debug = os.environ.get("HTC_VLM_DEBUG", "") not in ("", "0")
    try:
        return int(importlib.import_module(path).run(argv))
    except BrokenPipeError:
        # `htc-vlm ... | head`: the reader has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PARTLY
    except (ValueError, OSError, ImportError) as error:
        if debug or (isinstance(error, ImportError) and error.name is not None):
            raise
        print(f"htc-vlm {name}: {one_line(error)}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print(f"htc-vlm {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
