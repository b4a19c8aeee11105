"""Command: one page about a run, and its figures in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run

Run = Annotated[Path | None, typer.Option("--run", metavar="FOLDER", help="The run's folder; by default the last one.")]


def report(
    overrides: Overrides = None, folder: Run = None, recipe: Recipe = None, print_config: PrintConfig = False
) -> None:
    """Make a page about a run: figures, curves, sample texts, configuration, machine.

    The page is report.html in the run's folder. It is one file without links to
    others, so it can be sent to somebody as it is.
    """
    config = resolve(recipe, overrides, print_config)
    from evaluation.run_report import figures, newest_run, read_run, write_report

    found = read_run(folder or newest_run(Path(config.training.runs_dir)))
    page = write_report(found)
    print(f"Run {found.directory.name}")
    for label, value in figures(found):
        print(f"  {label:<32}{value:>14}")
    if found.curves.is_file():
        print(f"Loss curves: {found.curves}")
    print(f"Report:      {page}")
    print("Next: python scripts/generate.py")


def main() -> None:
    """Run the command."""
    run(report)


if __name__ == "__main__":
    main()
