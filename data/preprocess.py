"""Turn the downloaded documents into token files: clean, deduplicate, split, shuffle, tokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, progress, resolve, run
from config.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from config.schema import DataConfig

Force = Annotated[bool, typer.Option("--force", help="Begin anew, even if the token files are up to date.")]


def preprocess(
    overrides: Overrides = None, recipe: Recipe = None, force: Force = False, print_config: PrintConfig = False
) -> None:
    """Make corpus/tokens/ from the sources in data.use: train.bin, val.bin and what describes them.

    Documents are mended, filtered by length, deduplicated, split into training and validation parts, shuffled across
    the whole corpus, and tokenized. If interrupted, the same command continues; the old token files stay in use until
    the new ones are complete. Needs data/tokenizer.py to have run, and before it
    data/download_datasets.py, unless the sources are streamed.
    """
    config = resolve(recipe, overrides, print_config)
    _preprocess(config.data, force)
    print(f"Next: {_next_command(recipe, overrides or [])}")


def _preprocess(data: DataConfig, force: bool) -> None:
    from pathlib import Path

    from data.listing import check_names
    from data.pipeline.report import print_manifest
    from data.pipeline.run import preprocess as run_pipeline

    check_names(data.use, data)
    try:
        with progress() as bars:
            bar = bars.add_task("", total=None)
            manifest, changed = run_pipeline(
                data,
                force=force,
                show=lambda stage, done, total: bars.update(bar, description=stage, completed=done, total=total),
            )
    except KeyboardInterrupt as error:
        raise UserError("Stopped. Type the same command again to continue.") from error
    print_manifest(manifest, Path(data.tokens_dir), changed)


def _next_command(recipe: Path | None, overrides: list[str]) -> str:
    """The training command with the settings that this one was given."""
    import shlex

    return shlex.join(["python", "scripts/train.py", *(["--config", str(recipe)] if recipe else []), *overrides])


def main() -> None:
    """Run the command."""
    run(preprocess)


if __name__ == "__main__":
    main()
