"""Command: bring in a model of the Hugging Face hub, or from a folder in its form."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run
from config.errors import UserError

if TYPE_CHECKING:
    from config.schema import Config
    from data.tokenization.subword import SubwordTokenizer
    from model.transformer import Transformer

Source = Annotated[str, typer.Argument(metavar="FOLDER|OWNER/NAME", help="A folder on disk, or a model of the hub.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="A branch, tag or commit on the hub.")]
Adapter = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A LoRA or DoRA in peft's format, to be merged into the model.")
]
Output = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the checkpoint goes; by default checkpoints/NAME.")
]
ContextLength = Annotated[
    int | None, typer.Option(min=1, help="See fewer tokens at once than the model could, for less memory.")
]


def import_model(
    source: Source,
    overrides: Overrides = None,
    revision: Revision = None,
    adapter: Adapter = None,
    output: Output = None,
    context_length: ContextLength = None,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Make a checkpoint of a GPT-2 or Llama-like model in Hugging Face's form.

    Its weights, tokenizer and chat template become a folder that generate.py, eval.py,
    finetune.py and serve.py take by --checkpoint. Weights are read from safetensors only.
    The settings of the other sections go into the checkpoint as they are.
    """
    config = resolve(recipe, overrides, print_config)
    name = Path(source.rstrip("/")).name
    target = output or Path(config.training.checkpoint_dir) / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already. Give another folder as --output.")
    from model.waiting import watch_cores

    watch_cores()
    from model.huggingface.adapter import check_adapter
    from model.huggingface.folder import PATTERNS, describe, read_model

    if adapter is not None:
        check_adapter(adapter)
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"There is no folder {source}.")
        from data.hub.models import download_model

        folder = download_model(source, revision, PATTERNS)
    elif revision is not None:
        raise UserError("--revision goes with a model of the hub, not with a folder.")
    about = describe(folder)
    tokenizer = _tokenizer(folder, about.endings, about.pad)
    model = read_model(folder, about.architecture, adapter, context_length)
    if tokenizer.vocab_size > (model.config.vocab_size or 0):
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, more than the model's {model.config.vocab_size:,}."
        )
    path = _write(model, tokenizer, config, target, name)
    kind = "It answers chats" if tokenizer.chat_template else "It has no chat template, so it continues texts"
    print(f"Wrote {path}: {about.architecture}, {model.num_parameters() / 1e6:,.1f}M parameters. {kind}.")
    print(f'Next: python scripts/generate.py --checkpoint {shlex.quote(str(target))} --prompt "The future of AI is"')


def _tokenizer(folder: Path, endings: tuple[int, ...], pad: int | None) -> SubwordTokenizer:
    from transformers import AutoTokenizer

    from data.tokenization.imported import adopt_tokenizer, check_conversion

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries behind it raise bare Exception, too
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The tokenizer in {folder} cannot be read: {reason}") from error
    ours = adopt_tokenizer(theirs, endings, pad)
    check_conversion(ours, folder)
    return ours


def _write(model: Transformer, tokenizer: SubwordTokenizer, whole: Config, target: Path, name: str) -> Path:
    """The checkpoint and its tokenizer in `target`; returns the path of the checkpoint."""
    from model.checkpoint import save_checkpoint
    from model.checkpoint_folder import checkpoint_path, set_latest

    place = (target / "tokenizer").absolute()
    data = whole.data.model_copy(update={"tokenizer_dir": str(place)})
    state = {
        "model": dict(model.state_dict()),
        "config": whole.model_copy(update={"model": model.config, "data": data}).model_dump(),
        "step": 0,
        "run_name": name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "validation_loss": None,
        "finetuning": {"format": "messages"} if tokenizer.chat_template else None,
    }
    tokenizer.save(place)
    path = checkpoint_path(target, 0)
    save_checkpoint(path, state)
    set_latest(path)
    return path


def main() -> None:
    """Run the command line."""
    run(import_model)


if __name__ == "__main__":
    main()
