"""Command: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from config.command import PrintConfig, Recipe, resolve, run

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN | CHECKPOINT | SECTION.KEY=VALUE",
        help="Folders of runs, their names, or checkpoints, the first of which is the one to beat; and settings.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option("--output", metavar="FILE.html", help="Where the page goes.")]


def compare(
    words: Words = None,
    output: Output = Path("comparison.html"),
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Compare runs: what they cost, what they reached, which settings differ, and how sure a difference is.

    Everything comes from the runs' folders, so evaluate each run first, with
    scripts/eval.py and the same text and tasks. A run has the results of its newest
    checkpoint that was evaluated; name a checkpoint for those of another, even of the
    same run. Writes a page with the curves, too.
    """
    config = resolve(recipe, [word for word in words or [] if "=" in word], print_config)
    from evaluation.comparison_report import print_comparison, write_page
    from evaluation.subjects import open_subjects

    subjects = open_subjects([word for word in words or [] if "=" not in word], Path(config.training.runs_dir))
    print_comparison(subjects)
    write_page(subjects, output)
    print(f"Written to {output}, with the curves. Next: python scripts/report.py --run {subjects[0].files.directory}")


def main() -> None:
    """Run the command."""
    run(compare)


if __name__ == "__main__":
    main()
