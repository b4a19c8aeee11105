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
Available = Annotated[
    bool, typer.Option("--available", help="With --list: show what the configuration can fetch, with size and licence.")
]
MaxBytes = Annotated[
    str | None,
    typer.Option(
        "--max-bytes",
        metavar="SIZE",
        help="Fetch at most so much, such as 500MB or 5GB, in equal shares of the sources; "
        "what one does not need goes to those after it.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Fetch again what is already there.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check the SHA-256 of what is already there, not only sizes.")]


def download_datasets(
    words: Words = None,
    recipe: Recipe = None,
    list_sources: List = False,
    available: Available = False,
    max_bytes: MaxBytes = None,
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
    from data.listing import print_available, print_sources

    if available:
        print_available(config.data)
        return
    if list_sources:
        print_sources(config.data)
        return
    _download(names or config.data.use, config, force, verify, _size(max_bytes))
    print(f"Next: {_next_command(names if names != config.data.use else [], recipe, overrides)}")


def _size(text: str | None) -> int | None:
    """The number of bytes that `--max-bytes` names."""
    from config.sources import byte_count

    try:
        size = None if text is None else int(byte_count(text))
    except ValueError as error:
        raise UserError(f"--max-bytes: {error}.") from error
    if size == 0:
        raise UserError("--max-bytes: it must be more than 0.")
    return size


def _download(names: list[str], config: Config, force: bool, verify: bool, max_bytes: int | None) -> None:
    from data.download import download_source
    from data.listing import check_names, report
    from data.sources import Job

    check_names(names, config.data)
    names = list(dict.fromkeys(names))
    for number, name in enumerate(names):
        if max_bytes is not None and max_bytes <= 0:
            raise UserError(
                f"--max-bytes is used up by {', '.join(names[:number])}; nothing is left for {name!r}. Raise it."
            )
        share = None if max_bytes is None else max(1, max_bytes // (len(names) - number))
        try:
            with progress(in_bytes=True) as bars:
                job = Job(config.data.preprocess.max_bad_fraction, progress=bars, max_bytes=share)
                done = download_source(name, config.data, job=job, force=force, verify=verify)
        except KeyboardInterrupt as error:
            raise UserError(f"Stopped. Type the same command again to continue the download of {name!r}.") from error
        if max_bytes is not None:
            max_bytes -= done.manifest.taken or 0
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
