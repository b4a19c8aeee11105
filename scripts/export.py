"""Command: a checkpoint for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run

Target = Annotated[Path, typer.Argument(metavar="PATH", help="The folder to write.", show_default=False)]
To = Annotated[Literal["huggingface"], typer.Option("--to", help="What reads it: transformers, vLLM and their kin.")]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH|latest", help="A checkpoint, a folder of them, or the latest.")
]
DataType = Annotated[Literal["f32", "f16", "bf16"], typer.Option("--dtype", help="Of the weights that are written.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier export wrote there.")]

PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}


def export(
    path: Target,
    overrides: Overrides = None,
    to: To = "huggingface",
    checkpoint: Checkpoint = "latest",
    dtype: DataType = "f32",
    force: Force = False,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Write a checkpoint as other programs read it: a folder with weights, tokenizer, settings and a page about it.

    The model gives the same logits there, the tokenizer the same ids. An option of
    the model that has no counterpart there is refused by name.
    """
    config = resolve(recipe, overrides, print_config)
    from inference.exporting.card import serve_command
    from inference.exporting.folder import check_folder, write_folder
    from inference.exporting.subject import open_subject

    check_folder(path, force)
    subject = open_subject(checkpoint, config, PRECISIONS[dtype])
    write_folder(subject, path)
    print(f"Written to {path}: {subject.name}, {subject.architecture}, {subject.parameters:,} parameters in {dtype}.")
    print(f'Next: AutoModelForCausalLM.from_pretrained("{path}"), or {serve_command(subject, str(path))}')


def main() -> None:
    """Run the command."""
    run(export)


if __name__ == "__main__":
    main()
