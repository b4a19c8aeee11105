"""Command: a checkpoint for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run
from config.errors import UserError

if TYPE_CHECKING:
    from config.schema import Config
    from inference.exporting.subject import Subject

Target = Annotated[
    Path, typer.Argument(metavar="PATH", help="The folder, or the GGUF file, to write.", show_default=False)
]
To = Annotated[
    Literal["huggingface", "gguf", "adapter"],
    typer.Option("--to", help="A folder for transformers, vLLM and their kin, a file for llama.cpp, or peft's folder."),
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH|latest", help="A checkpoint, a folder of them, or the latest.")
]
DataType = Annotated[
    Literal["f32", "f16", "bf16", "q8_0"],
    typer.Option("--dtype", help="Of the weights that are written; q8_0, 8.5 bits each, only in gguf."),
]
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
    """Write a checkpoint as other programs read it: weights, tokenizer, settings.

    Hugging Face's is a folder with a page about the model in it, llama.cpp's a file. The adapter of a fine-tuning run
    goes alone into a folder of peft, for the model that was exported from what the run began with.
    An option of the model that has no counterpart there is refused by name.
    """
    config = resolve(recipe, overrides, print_config)
    if dtype == "q8_0" and to != "gguf":
        raise UserError("--dtype q8_0 is of llama.cpp. Add --to gguf, or choose f32, f16 or bf16.")
    write = {"gguf": _write_gguf, "adapter": _write_adapter, "huggingface": _write_folder}[to]
    subject, what, following = write(path, config, checkpoint, dtype, force)
    print(f"Written to {path}: {subject.name}, {what} in {dtype}.")
    print(f"Next: {following}")


def _write_folder(path: Path, config: Config, checkpoint: str, dtype: str, force: bool) -> tuple[Subject, str, str]:
    """Write the folder; of whom, what was written, and what to type next."""
    from inference.exporting.card import serve_command
    from inference.exporting.folder import check_folder, write_folder
    from inference.exporting.subject import open_subject

    check_folder(path, force)
    subject = open_subject(checkpoint, config, PRECISIONS[dtype])
    write_folder(subject, path)
    what = f"{subject.architecture}, {subject.parameters:,} parameters"
    return subject, what, f'AutoModelForCausalLM.from_pretrained("{path}"), or {serve_command(subject, str(path))}'


def _write_adapter(path: Path, config: Config, checkpoint: str, dtype: str, force: bool) -> tuple[Subject, str, str]:
    """Write peft's folder; of whom, what was written, and what to type next."""
    from inference.exporting.adapter import check_adapter, write_adapter
    from inference.exporting.subject import open_subject

    check_adapter(path, force)
    subject = open_subject(checkpoint, config, PRECISIONS[dtype])
    return subject, write_adapter(subject, path), f'PeftModel.from_pretrained(base, "{path}")'


def _write_gguf(path: Path, config: Config, checkpoint: str, dtype: str, force: bool) -> tuple[Subject, str, str]:
    """Write the file; of whom, what was written, and what to type next."""
    from inference.exporting.gguf_file import check_file, write_gguf
    from inference.exporting.subject import open_subject

    check_file(path, force)
    subject = open_subject(checkpoint, config)
    write_gguf(subject, path, dtype)
    what = f"{subject.architecture}, {subject.parameters:,} parameters"
    return subject, what, f"llama-server -m {path}"


def main() -> None:
    """Run the command."""
    run(export)


if __name__ == "__main__":
    main()
