"""Turn the downloaded documents into token files: clean, deduplicate, split, shuffle, tokenize."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, command_line, progress, resolve, run
from config.errors import UserError

if TYPE_CHECKING:
    from config.schema import DataConfig
    from data.pipeline.work import Show

Force = Annotated[bool, typer.Option("--force", help="Begin anew, even if the token files are up to date.")]

DryRun = Annotated[
    int | None,
    typer.Option(
        "--dry-run", metavar="N", min=1, help="Try the settings on about N documents; leaves only a page to look at."
    ),
]


def preprocess(
    overrides: Overrides = None,
    recipe: Recipe = None,
    force: Force = False,
    dry_run: DryRun = None,
    print_config: PrintConfig = False,
) -> None:
    """Make corpus/tokens/ from the sources in data.use: train.bin, val.bin and what describes them.

    Documents are mended, filtered by length, deduplicated, split into training and validation parts, shuffled across
    the whole corpus, and tokenized. If interrupted, the same command continues; the old token files stay in use until
    the new ones are complete. Needs data/tokenizer.py to have run, and before it
    data/download_datasets.py, unless the sources are streamed.
    """
    config = resolve(recipe, overrides, print_config)
    if dry_run is not None:
        _dry_run(config.data, dry_run)
        print(f"Next: {command_line('data/preprocess.py', recipe, overrides)}")
        return
    _preprocess(config.data, force)
    print(f"Next: {command_line('scripts/train.py', recipe, overrides)}")


def _preprocess(data: DataConfig, force: bool) -> None:
    from config.files import location
    from data.pipeline.report import print_manifest, print_tables
    from data.pipeline.run import preprocess as run_pipeline

    with _shown(data, "Stopped. Type the same command again to continue.") as show:
        manifest, changed = run_pipeline(data, force=force, show=show)
    print_tables(manifest)
    print_manifest(manifest, location(data.tokens_dir), changed)


def _dry_run(data: DataConfig, records: int) -> None:
    from data.pipeline.report import print_tables
    from data.pipeline.run import dry_run

    with _shown(data, "Stopped.") as show:
        manifest, page = dry_run(data, records, show)
    print_tables(manifest)
    print(f"Tried on the beginnings of the files; no token files were written. What each rule dropped: {page}")


@contextmanager
def _shown(data: DataConfig, stopped: str) -> Iterator[Show]:
    """A progress bar for the stages of the pipeline; `stopped` is what Ctrl-C says."""
    from data.listing import check_names

    check_names(data.use, data)
    try:
        with progress() as bars:
            bar = bars.add_task("", total=None)
            yield lambda stage, done, total: bars.update(bar, description=stage, completed=done, total=total)
    except KeyboardInterrupt as error:
        raise UserError(stopped) from error


def main() -> None:
    """Run the command."""
    run(preprocess)


if __name__ == "__main__":
    main()
