"""Download the sources of text that a model is trained on, or list those that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from config.command import PrintConfig, Recipe, progress, resolve, run
from config.errors import UserError

if TYPE_CHECKING:
    from config.schema import Config

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE | SECTION.KEY=VALUE",
        help="Names under data.sources, by default those in data.use; and single settings.",
        show_default=False,
    ),
]
List = Annotated[bool, typer.Option("--list", help="Show the sources that are on this machine and stop.")]
Force = Annotated[bool, typer.Option("--force", help="Fetch again what is already there.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check the SHA-256 of what is already there, not only sizes.")]


def download_datasets(
    words: Words = None,
    recipe: Recipe = None,
    list_sources: List = False,
    force: Force = False,
    verify: Verify = False,
    print_config: PrintConfig = False,
) -> None:
    """Download text into corpus/raw/, one folder per source.

    The built-in source, sample, needs no network.

    What was interrupted is continued, and what is complete is not fetched again.
    """
    names = [word for word in words or [] if "=" not in word]
    overrides = [word for word in words or [] if "=" in word]
    config = resolve(recipe, overrides, print_config)
    from data.listing import print_sources

    if list_sources:
        print_sources(config.data)
        return
    _download(names or config.data.use, config, force, verify)
    print(f"Next: {_next_command(names if names != config.data.use else [], recipe, overrides)}")


def _download(names: list[str], config: Config, force: bool, verify: bool) -> None:
    from data.download import download_source
    from data.listing import check_names, report
    from data.sources import Job

    check_names(names, config.data)
    for name in dict.fromkeys(names):
        try:
            with progress(in_bytes=not getattr(config.data.sources[name], "streaming", False)) as bars:
                job = Job(config.data.preprocess.max_bad_fraction, progress=bars)
                done = download_source(name, config.data, job=job, force=force, verify=verify)
        except KeyboardInterrupt as error:
            raise UserError(f"Stopped. Type the same command again to continue the download of {name!r}.") from error
        report(name, done)


def _next_command(names: list[str], recipe: Recipe, overrides: list[str]) -> str:
    """The tokenizer's command with the settings that this one was given."""
    import shlex

    words = ["python", "data/tokenizer.py", *(["--config", str(recipe)] if recipe else []), *overrides]
    if names and not any(override.startswith("data.use=") for override in overrides):
        words.append(f"data.use=[{','.join(dict.fromkeys(names))}]")
    return shlex.join(words)


def main() -> None:
    """Run the command."""
    run(download_datasets)


if __name__ == "__main__":
    main()
