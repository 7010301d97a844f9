"""`htc-vlm table NAME`: the paper's tables recomputed, or a table rebuilt from committed results.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from htc_vlm.eval.paper import paper_markdown
from htc_vlm.eval.tables import render, to_csv, to_markdown

# Rows of Table 1 in the paper's order; other rows follow by name.
ORDER = ("upper-bound", "qformer", "avg-pool", "voco", "htc", "lower-bound")


def run(argv: list[str]) -> int:
    """Print a table; "paper" is the paper's Tables 1, 2 and 4, anything else is <results>/NAME."""
    parser = argparse.ArgumentParser(prog="htc-vlm table", description=run.__doc__)
    parser.add_argument("name", help="'paper', or a folder of --results such as table1")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the result files are")
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    args = parser.parse_args(argv)
    if args.name == "paper":
        if args.format != "markdown":
            raise ValueError("the paper's tables are printed as markdown only")
        print(paper_markdown(), end="")
        return 0
    lines = render(args.results / args.name, ORDER)
    print(to_markdown(lines) + "\n" if args.format == "markdown" else to_csv(lines), end="")
    return 0
