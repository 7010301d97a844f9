"""What the README and docs/*.md show is run: python blocks are executed, the arguments of `htc-vlm` lines are parsed.

A block that cannot run here (it needs a 7B checkpoint, say) has a line `<!-- not run: reason -->` before it.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
from pathlib import Path

import pytest

import htc_vlm_cli as cli

REPO = Path(__file__).resolve().parents[1]
PAGES = [page for page in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))) if page.is_file()]
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n+)?^```(?P<language>\w+)\n(?P<body>.*?)^```", re.M | re.S)
# What a reader has in the folder where the snippets are run.
LINKED = ("examples", "study")


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """(line number, body) of the fenced blocks in one of the languages, without those marked "not run"."""
    return [
        (text.count("\n", 0, match.start("body")), match["body"])
        for match in BLOCK.finditer(text)
        if match["language"] in languages and not match["skip"]
    ]


def command_lines(text: str) -> list[str]:
    """The `htc-vlm ...` lines of the bash blocks, continuation lines joined, a leading `$ ` removed."""
    bodies = [body.replace("\\\n", " ") for _, body in blocks(text, "bash", "sh", "console")]
    lines = [line.strip().removeprefix("$ ") for body in bodies for line in body.split("\n")]
    return [line for line in lines if line.split(" ")[0] == "htc-vlm"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_docs_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kvpress's README examples used renamed arguments and raised TypeError until somebody complained (#249)."""
    for name in LINKED:
        if (REPO / name).is_dir():
            (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    text = page.read_text(encoding="utf-8")
    for line, body in blocks(text, "python", "py"):
        # The blank lines make a traceback point into the page.
        exec(compile("\n" * line + body, str(page), "exec"), names)


COMMANDS = [
    (page.name, command) for page in PAGES for command in command_lines(page.read_text(encoding="utf-8"))
]  # fmt: skip


class Parsed(Exception):
    """Instead of what a command does with its arguments."""


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_in_the_docs_are_taken(
    page: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed option, or an argument that is left out and has no default, is the first thing a newcomer trips over."""
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, argv: list[str]) -> None:
        parse(self, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    words = shlex.split(command, comments=True)[1:]
    try:
        assert cli.main(list(itertools.takewhile(lambda word: word not in ("|", ">", "&&", "&", "2>"), words))) == 0
    except Parsed:
        pass
    except SystemExit as stop:  # 0: it was asked for its help
        assert not stop.code, f"{page}: `{command}`: {capsys.readouterr().err}"


def test_blocks_finds_what_is_to_be_run_and_only_that() -> None:
    """A regular expression that matches nothing would let every page pass."""
    text = "a\n```python\nx = 1\n```\n<!-- not run: 7B -->\n```python\ny\n```\n"
    text += "```bash\n$ htc-vlm ask \\\n a.png\nls\n```\n"
    assert blocks(text, "python") == [(2, "x = 1\n")]
    assert [command.split() for command in command_lines(text)] == [["htc-vlm", "ask", "a.png"]]
