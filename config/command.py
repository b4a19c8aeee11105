"""What every command line shares: the common options, one way to fail, one kind of progress bar.

A command is a module with a `main()` that calls `run(command_function)`. Nothing heavy is imported before its
arguments are understood, so `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from config.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from config.schema import Config

Recipe = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="RECIPE.yaml", help="Settings over the defaults, such as config/recipes/demo.yaml."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Single settings over that, such as training.max_steps=100."),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="CHECKPOINT",
        help="Go on from a checkpoint exactly where it stood: a file such as checkpoints/model_step_500.pt, or latest. "
        "For training, auto: from the latest of training.run_name, or from the beginning.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Compute the same bits every time, slower on a GPU (training.deterministic)."),
]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Watch a few steps: time line, costliest operators, memory; in runs/NAME/profile/."),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")]


def run(function: Callable[..., Any] | dict[str, Callable[..., Any]], arguments: Sequence[str] | None = None) -> None:
    """Run `function` as a typer command; exit 0, or 1 with one message on a `UserError`, or 130 on Ctrl-C.

    Several functions by their names are subcommands, described by the docstring of their module.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
    if isinstance(function, dict):
        module = sys.modules[next(iter(function.values())).__module__]
        app.callback(help=module.__doc__, context_settings=settings)(lambda: None)
        for name, each in function.items():
            app.command(name, help=_paragraphs(each), context_settings=settings)(each)
    else:
        app.command(help=_paragraphs(function), context_settings=settings)(function)
    try:
        app(args=list(arguments) if arguments is not None else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _paragraphs(function: Callable[..., Any]) -> str:
    """The docstring with each paragraph on one line, so that the terminal and not the source decides where it wraps."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def resolve(
    recipe: Path | None, overrides: Sequence[str] | None, print_config: bool = False, base: Sequence[Path] = ()
) -> Config:
    """The configuration a command line asks for; with `print_config`, print it and exit.

    `base` are recipes of the command itself, under the user's own.
    """
    from config.load import load_config

    config = load_config([*base, *([recipe] if recipe else [])], overrides or [])
    show(config, print_config)
    return config


def with_determinism(overrides: Sequence[str] | None, wanted: bool) -> list[str]:
    """The overrides with what `--deterministic` stands for."""
    return [*(overrides or []), *(["training.deterministic=true"] if wanted else [])]


def show(config: Config, wanted: bool = True) -> None:
    """If it is `wanted`, print the configuration and exit."""
    from config.load import to_yaml

    if wanted:
        print(to_yaml(config), end="")
        raise typer.Exit()


def command_line(script: str, recipe: Path | None, overrides: Sequence[str] | None, *more: str) -> str:
    """A command as one types it, such as the next one of the road, with the settings that this one was given."""
    import shlex

    return shlex.join(["python", script, *(["--config", str(recipe)] if recipe else []), *(overrides or []), *more])


def size_of(option: str, text: str) -> int:
    """The number of bytes, at least 1, that the value of an option names, such as `5GB`; `UserError` if it does not."""
    from config.sources import byte_count

    try:
        size = int(byte_count(text))
    except ValueError as error:
        raise UserError(f"{option}: {error}.") from error
    if size < 1:
        raise UserError(f"{option}: it must be more than 0.")
    return size


def table_console(width: int = 120) -> Console:
    """A console for tables on standard output: `width` columns wide where that is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def progress(in_bytes: bool = False, **options: Any) -> Progress:
    """A progress bar with count (or bytes and their rate), elapsed time and ETA, on standard error.

    It is silent where standard error is no terminal.
    """
    from rich import progress as bars
    from rich.console import Console
    from rich.table import Column

    console = Console(stderr=True)
    amount: list[bars.ProgressColumn] = [bars.MofNCompleteColumn()]
    if in_bytes:
        whole = Column(no_wrap=True)
        amount = [bars.DownloadColumn(table_column=whole), bars.TransferSpeedColumn(table_column=whole)]
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        *amount,
        bars.TimeElapsedColumn(),
        bars.TextColumn("ETA"),
        bars.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        **options,
    )
