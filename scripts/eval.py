"""Command: how well a checkpoint predicts held-out text."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, progress, resolve, run
from config.errors import UserError
from config.files import local

if TYPE_CHECKING:
    from config.schema import Config
    from data.tokenization import Tokenizer
    from data.tokens import TokenFiles
    from evaluation.perplexity import Evaluation
    from model.checkpoint import CheckpointInfo
    from model.transformer import Transformer
    from training.distributed import Process
    from training.precision import Precision

Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH|latest", help="A checkpoint, a folder of them, or the latest.")
]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Any UTF-8 text file, instead of the validation tokens.")
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Targets from one window to the next: the smaller, the more context, and the slower."),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows per forward pass; changes the speed alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def evaluate(
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    text: Text = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Measure how well a checkpoint predicts the validation tokens, or any text file.

    Gives loss, perplexity and bits per byte. Every token but the first is scored
    once, with at least `context - stride` tokens before it; by default the stride is
    half the context. The result also goes to evaluation.json in the run's folder.
    """
    config = resolve(recipe, overrides, print_config)
    from training.environment import calm_threads

    calm_threads()
    from data.tokenization.matching import matching_tokenizer
    from model.checkpoint import load_model
    from model.checkpoint_folder import resolve_checkpoint
    from training.distributed import open_process
    from training.precision import Precision

    path = resolve_checkpoint(checkpoint, Path(config.training.checkpoint_dir))
    with open_process(config.training.device) as process:
        model, info = load_model(path, process.device)
        places = [config.data.tokenizer_dir, info.config["data"]["tokenizer_dir"]]
        tokenizer = matching_tokenizer(info.tokenizer_fingerprint, [Path(place) for place in places])
        stride = _stride(stride, model.config.context_length)
        precision = Precision(config.training.precision, process.device)
        found = _evaluate(config, process, precision, model, info, tokenizer, text, stride, batch_size)
        if process.is_main:
            _report(found, config, model, info, text, stride, precision.name, as_json)


def _stride(stride: int | None, context_length: int) -> int:
    if stride is not None and stride > context_length:
        raise UserError(
            f"--stride {stride} would skip tokens: the model sees {context_length} at once, so that is the largest."
        )
    return stride or max(1, context_length // 2)


def _evaluate(
    config: Config,
    process: Process,
    precision: Precision,
    model: Transformer,
    info: CheckpointInfo,
    tokenizer: Tokenizer,
    text: Path | None,
    stride: int,
    batch_size: int | None,
) -> Evaluation:
    from evaluation.bootstrap import FEWEST_BLOCKS
    from evaluation.perplexity import default_batch_size, evaluate_tokens
    from evaluation.text import read_text_tokens

    files = None if text is not None else _validation_tokens(config, tokenizer)
    tokens = read_text_tokens(text, tokenizer) if text is not None else files
    assert tokens is not None
    context = model.config.context_length
    bars = progress()
    task = bars.add_task("Evaluating", total=len(tokens) - 1)
    with bars if process.is_main else nullcontext():
        return evaluate_tokens(
            model,
            tokens,
            context_length=context,
            stride=stride,
            batch_size=batch_size or default_batch_size(context, tokenizer.vocab_size, process.device),
            device=process.device,
            token_bytes=tokenizer.token_bytes(),
            block_ends=files.document_ends if files is not None and len(files.document_ends) >= FEWEST_BLOCKS else None,
            document_ends=files.document_ends if files is not None and info.masked else None,
            rank=process.rank,
            world_size=process.world_size,
            autocast=precision.dtype if precision.mixed else None,
            advance=lambda targets: bars.advance(task, targets * process.world_size),
        )


def _validation_tokens(config: Config, tokenizer: Tokenizer) -> TokenFiles:
    from data.tokens import TokenFiles, check_tokens

    files = TokenFiles(local(config.data.tokens_dir, "data.tokens_dir"), "val")
    check_tokens(files.manifest, tokenizer.fingerprint, tokenizer.vocab_size)
    if len(files) < 2:
        raise UserError(
            f"{config.data.tokens_dir} holds no validation text. Preprocess with a higher "
            "data.preprocess.validation_fraction, or evaluate on a file with --text."
        )
    return files


def _report(
    found: Evaluation,
    config: Config,
    model: Transformer,
    info: CheckpointInfo,
    text: Path | None,
    stride: int,
    precision: str,
    as_json: bool,
) -> None:
    from evaluation.report import print_table, save_report, to_json

    what = str(text) if text is not None else str(Path(config.data.tokens_dir) / "val.bin")
    about = {
        "checkpoint": str(info.path),
        "step": info.step,
        "text": what,
        "context_length": model.config.context_length,
        "stride": stride,
        "precision": precision,
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
    }
    report = to_json(found, about)
    name = "evaluation.json" if text is None else f"evaluation-{text.stem}.json"
    run_dir = Path(config.training.runs_dir) / info.run_name if info.run_name else None
    written = save_report(report, run_dir, info.path, name)
    if as_json:
        print(report, end="")
    else:
        print_table(found, f"{info.path} (step {info.step:,}) on {what}")
    where = sys.stderr if as_json else sys.stdout
    print(f'Written to {written}. Next: python scripts/generate.py --prompt "The future of AI is"', file=where)


def main() -> None:
    """Run the command."""
    run(evaluate)


if __name__ == "__main__":
    main()
