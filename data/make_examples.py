"""Command: make a set of examples to fine-tune on, from the standard library of the running Python."""

from typing import Annotated, Literal

import typer

from config.command import Overrides, PrintConfig, Recipe, progress, resolve, run
from config.errors import UserError


def make_examples(
    overrides: Overrides = None,
    form: Annotated[
        Literal["prompt-completion", "messages"],
        typer.Option("--format", help="Continue a text, or answer a message of a chat."),
    ] = "prompt-completion",
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Make examples to try fine-tuning with: from a function's signature to what the function does.

    They come from the standard library of the running Python: "def gcd(a, b):" is
    to be answered with the first line of the function's documentation. One JSON
    object per line goes to corpus/finetuning/; a set of your own looks the same.
    """
    config = resolve(recipe, overrides, print_config)

    import sysconfig
    from pathlib import Path

    from data.examples.docstrings import write_examples
    from data.sources.sample import standard_library

    library = Path(sysconfig.get_paths()["stdlib"])
    modules = standard_library(library)
    if not modules:
        raise UserError(f"This Python has no sources of its standard library in {library}; use examples of your own.")
    path = Path(config.data.corpus_dir) / "finetuning" / f"docstrings-{form}.jsonl"
    with progress() as bar:
        count = write_examples(bar.track(modules, description="Reading functions"), form, path)
    print(f"{count:,} examples written to {path}. Next: python scripts/finetune.py --dataset {path}")


def main() -> None:
    """Run the command."""
    run(make_examples)


if __name__ == "__main__":
    main()
