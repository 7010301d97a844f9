"""`python -m study table NAME`: the paper's tables recomputed, or a table rebuilt from committed results.

Source:  ours.
Differs: nothing known.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from study.definitions import TABLES, read_tables
from study.grids import cost_grid, csv_grid, differences_grid, refusals, retention_grid, scores_grid
from study.paper import paper_markdown
from study.study_tables import StudyTable, load_table
from study.tables import to_csv, to_markdown

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def study_markdown(study: StudyTable) -> str:
    """All grids of one table, one below the other."""
    parts = [f"# {study.table.title}", study.table.about]
    for group in study.table.columns:
        parts += [f"## Right answers in percent, {group}", to_markdown(scores_grid(study, group))]
    parts += ["## Retention in percent", to_markdown(retention_grid(study))]
    parts += ["## What it costs", to_markdown(cost_grid(study))]
    if study.table.compare:
        parts += ["## Differences in points, 95 % intervals over pictures", to_markdown(differences_grid(study))]
    if refused := refusals(study):
        parts += ["## Impossible here", "\n".join(f"- {title}: {why}" for title, why in refused)]
    return "\n\n".join(part for part in parts if part) + "\n"


def run(argv: list[str]) -> int:
    """Print a table; "paper" is the paper's Tables 1, 2 and 4; the others are those of study/experiments/tables.yaml."""
    parser = argparse.ArgumentParser(prog="python -m study table", description=run.__doc__)
    parser.add_argument("name", help="'paper', or a table of the study such as table1")
    parser.add_argument("--results", type=Path, default=Path("study/results"), help="where the result files are")
    parser.add_argument("--experiments", type=Path, default=EXPERIMENTS, help="where the rows are defined")
    parser.add_argument("--format", choices=("markdown", "csv", "png"), default="markdown")
    parser.add_argument("--output", type=Path, help="a file to write instead of printing; png needs one")
    args = parser.parse_args(argv)
    if args.format == "png" and args.output is None:
        raise ValueError("a picture needs a file: --output FILE.png")
    if args.name == "paper":
        if args.format != "markdown":
            raise ValueError("the paper's tables are printed as markdown only")
        text = paper_markdown()
    elif args.name in read_tables(args.experiments):
        study = load_table(args.name, args.experiments, args.results)
        if args.format == "png":
            from study.plots import draw

            draw(study, args.output)
            return 0
        text = study_markdown(study) if args.format == "markdown" else to_csv(csv_grid(study))
    else:
        known = ", ".join(("paper", *read_tables(args.experiments)))
        raise ValueError(f"no table {args.name!r} in {args.experiments / TABLES}; there are: {known}")
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    return 0
