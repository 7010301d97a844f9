"""Pages with generated blocks: what stands between `<!-- NAME -->` and `<!-- /NAME -->` is made from results and code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_blocks(page: Path, blocks: Mapping[str, Callable[[], str]]) -> dict[Path, str]:
    """{page: its text with every block made anew}; ValueError for a block that the page does not have."""
    text = page.read_text(encoding="utf-8")
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name} has no block <!-- {name} --> ... <!-- /{name} -->")
        content = make()
        text = pattern.sub(lambda match, content=content: match[1] + content + "\n" + match[2], text)
    return {page: text}


def out_of_date(files: Mapping[Path, str]) -> list[str]:
    """The names of the files that say something else."""
    return [path.name for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def check_or_write(
    files: Callable[[], Mapping[Path, str]] | Iterable[Callable[[], Mapping[Path, str]]],
    description: str | None,
    after: Callable[[], None] | None = None,
) -> int:
    """The command of one page, or of several that are written in turn, since one may read another.

    --check writes nothing and returns 1 for a page that is out of date. after: draws plots.
    """
    makers = [files] if callable(files) else list(files)
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="say whether the page is up to date; write nothing")
    is_check = arguments.parse_args().check
    if is_check:
        stale = [name for make in makers for name in out_of_date(make())]
        if stale:
            print(f"{', '.join(stale)}: not what the results and the code say; `make table` rebuilds it", file=sys.stderr)
        return int(bool(stale))
    for make in makers:
        for path, text in make().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if after is not None:
        after()
    return 0
