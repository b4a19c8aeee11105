"""Download the sources of text that a model is trained on, or list those that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from config.command import PrintConfig, Recipe, command_line, progress, resolve, run, size_of
from config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from config.schema import Config, DataConfig

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
    _download(names or config.data.use, config, force, verify, size_of("--max-bytes", max_bytes) if max_bytes else None)
    for line in _next_lines(names, config.data, recipe, overrides):
        print(line)


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


def _next_lines(names: list[str], data: DataConfig, recipe: Recipe, overrides: list[str]) -> Iterator[str]:
    """What to type next, with the settings that this command was given: texts are tokenized, conversations trained on.

    `names` are the sources that were asked for by name; without any, those in `data.use` are there now.
    """
    from pathlib import Path

    from config.sources import CONVERSATIONS

    talks = {name for name, source in data.sources.items() if getattr(source, "text_column", None) in CONVERSATIONS}
    asked = list(dict.fromkeys(names or data.use))
    texts = [name for name in asked if name not in talks]
    if texts:
        chosen = any(word.startswith("data.use=") for word in overrides)
        use = [name for name in data.use if name not in talks] if chosen else texts
        more = [f"data.use=[{','.join(use)}]"] if use != data.use else []
        others = [word for word in overrides if not (more and word.startswith("data.use="))]
        yield f"Next: {command_line('data/tokenizer.py', recipe, others, *more)}"
    for name in [name for name in asked if name in talks]:
        when = "Once there is a model to teach" if texts else "Next"
        dataset = ("--dataset", str(Path(data.raw_dir) / name))
        yield f"{when}: {command_line('scripts/finetune.py', recipe, overrides, *dataset)}"


def main() -> None:
    """Run the command."""
    run(download_datasets)


if __name__ == "__main__":
    main()
