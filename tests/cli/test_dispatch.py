"""The dispatcher: fast, and a refusal is one line."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

import htc_vlm_cli as cli

from .. import processes


def install(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Make `htc-vlm ask` run the given function."""
    command = types.ModuleType("htc_vlm.cli.ask")
    command.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "htc_vlm.cli.ask", command)
    monkeypatch.setattr(cli, "available", lambda: {"ask": "ask a question"})


def test_help_imports_neither_torch_nor_transformers() -> None:
    """Importing both takes seconds; nobody should wait for them to read a help text."""
    code = (
        "import sys; from htc_vlm_cli import main; assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    done = processes.run_code(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: htc-vlm COMMAND")


def test_only_commands_that_exist_are_listed() -> None:
    """A listed command without a file would end in ModuleNotFoundError."""
    folder = Path(cli.__file__).parent / "htc_vlm" / "cli"
    assert set(cli.available()) == set(cli.COMMANDS) & {path.stem.replace("_", "-") for path in folder.glob("*.py")}


def test_every_file_in_the_folder_is_a_listed_command() -> None:
    """A command file that the table does not name could never be called."""
    folder = Path(cli.__file__).parent / "htc_vlm" / "cli"
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files <= set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("n_keep is 0; give 1 or more"), "htc-vlm ask: n_keep is 0; give 1 or more\n"),
        (FileNotFoundError(2, "No such file", "x.png"), "htc-vlm ask: x.png: No such file\n"),
        (OSError("the disk is full"), "htc-vlm ask: the disk is full\n"),
        (ValueError(), "htc-vlm ask: ValueError\n"),
        (ImportError("LoRA needs peft; install it"), "htc-vlm ask: LoRA needs peft; install it\n"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback for a mistyped file name hides the one line that matters."""

    def run(argv: list[str]) -> int:
        raise error

    install(monkeypatch, run)
    monkeypatch.delenv("HTC_VLM_DEBUG", raising=False)
    assert cli.main(["ask", "x.png"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hiding tracebacks from the people who must fix them helps nobody."""

    def run(argv: list[str]) -> int:
        raise ValueError("inside")

    install(monkeypatch, run)
    monkeypatch.setenv("HTC_VLM_DEBUG", "1")
    with pytest.raises(ValueError, match="inside"):
        cli.main(["ask"])


def test_a_bug_is_not_dressed_up_as_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swallowing every exception would turn our own mistakes into the user's."""

    for bug in (TypeError("a bug"), ModuleNotFoundError("No module named 'htc'", name="htc")):

        def run(argv: list[str], bug: Exception = bug) -> int:
            raise bug

        install(monkeypatch, run)
        with pytest.raises(type(bug)):
            cli.main(["ask"])


def test_arguments_and_exit_code_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exit code that is dropped makes a failed run look good in a script."""
    seen: list[list[str]] = []

    def run(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    install(monkeypatch, run)
    assert cli.main(["ask", "a.png", "what ?", "--json"]) == 7
    assert seen == [["a.png", "what ?", "--json"]]


def test_an_unknown_command_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 after a mistyped command would let a script go on."""
    assert cli.main(["no-such-command"]) == 2
    assert "no command 'no-such-command'" in capsys.readouterr().err


def test_no_command_prints_the_usage_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """The usage belongs on stderr then: stdout is for answers."""
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage:")


def test_the_help_of_no_command_imports_torch() -> None:
    """`htc-vlm ask --help` took six seconds. test_layers.py reads the same from the files; this runs them."""
    code = (
        "import contextlib, io, sys\nimport htc_vlm_cli as cli\n"
        "for name in cli.available():\n"
        "    out = io.StringIO()\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):\n"
        "        cli.main([name, '--help'])\n"
        "    assert out.getvalue().startswith('usage: htc-vlm ' + name), out.getvalue()\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), name\n"
    )
    done = processes.run_code(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_public_names_come_when_a_command_asks_for_them() -> None:
    """A command that puts off the imports must find the same names, and the Auto classes must know the model."""
    code = (
        "import sys, htc_vlm_cli\nhtc_vlm_cli.is_running = True\nimport htc_vlm\n"
        "assert 'torch' not in sys.modules\n"
        "from htc_vlm import CompressedImages, apply, compressors, load\n"
        "assert compressors.apply is apply and 'htc' in compressors.names()\n"
        "from transformers import AutoConfig\nassert AutoConfig.for_model('htc_vlm').model_type == 'htc_vlm'\n"
    )
    done = processes.run_code(code)
    assert done.returncode == 0, done.stderr
