"""Command: how good a checkpoint is, on held-out text or in tasks."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from config.command import Overrides, PrintConfig, Recipe, progress, resolve, run
from config.errors import UserError
from evaluation.in_tasks import check_tasks, report_tasks, run_in_tasks

if TYPE_CHECKING:
    from config.schema import Config
    from data.tokenization import Tokenizer
    from evaluation.harness import Writing
    from evaluation.held_out import HeldOut
    from evaluation.judged import Judged
    from evaluation.perplexity import Evaluation
    from training.distributed import Process

SLOTS = 16  # texts that are written at once

Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH|latest", help="A checkpoint, a folder of them, or the latest.")
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Any UTF-8 text file, instead of the validation tokens; may be given several times.",
    ),
]
Source = Annotated[
    str | None,
    typer.Option("--source", metavar="NAME", help="A source of data.sources instead, such as a data set of the hub."),
]
MaxTokens = Annotated[int, typer.Option(min=2, help="With --source: so many tokens of it, from its beginning.")]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="Targets from one window to the next: the smaller, the more context, and the slower."),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        help="Tasks of lm-eval instead, such as hellaswag,arc_easy; quern: those of the project, which need no "
        "network; core: the CORE score.",
    ),
]
IncludePath = Annotated[
    list[Path] | None, typer.Option("--include-path", metavar="FOLDER", help="A folder of task files of your own.")
]
Fewshot = Annotated[int | None, typer.Option(min=0, help="Solved examples before each question, where a task allows.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each task.")]
CoreFiles = Annotated[
    Path | None, typer.Option("--core-files", metavar="FOLDER", help="With --tasks core: DCLM's evaluation bundle.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows, or answers, per forward pass; changes the speed alone.")
]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="int8|int4", help="Measure the weights in so many bits, and on text what that costs."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def evaluate(
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    text: Text = None,
    source: Source = None,
    max_tokens: MaxTokens = 1_000_000,
    stride: Stride = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    fewshot: Fewshot = None,
    limit: Limit = None,
    core_files: CoreFiles = None,
    batch_size: BatchSize = None,
    quantize: Quantize = None,
    as_json: Json = False,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Measure a checkpoint on the validation tokens, on any other text, or in tasks.

    On text: loss, perplexity and bits per byte. Every token but the first is scored
    once, with at least `context - stride` tokens before it; by default the stride is
    half the context. The result also goes to evaluation.json in the run's folder.

    With --tasks: accuracies and the like, and into tasks.json in the run's folder.
    Both also stay by step, in evaluations/step_N/, for scripts/compare.py.
    """
    given = [f"generation.quantize={quantize}"] if quantize else []
    config = resolve(recipe, [*(overrides or []), *given], print_config)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise UserError("--tasks names no task. Name one or more, such as --tasks quern or --tasks hellaswag,arc_easy.")
    for_text = {"--text": text, "--source": source, "--stride": stride}
    for_tasks = {"--include-path": include_path, "--fewshot": fewshot, "--limit": limit, "--core-files": core_files}
    _refuse_mixture(for_text if names else for_tasks, bool(names))
    if text and source:
        raise UserError("--text and --source are two different texts. Give one of them.")
    from model.waiting import watch_cores

    watch_cores()
    from training.distributed import open_process

    if names:
        check_tasks(names, include_path or [], core_files)
    with open_process(config.training.device) as process:
        judged = _open(checkpoint, config, process, batch_size)
        from inference.quantization import quantize_

        kind = config.generation.quantize
        fewer_bits = replace(judged, quantize=kind)
        if names:
            quantize_(judged.model, kind)
            results = run_in_tasks(
                fewer_bits, names, include_path or [], core_files, fewshot, limit, partial(_write, fewer_bits)
            )
            if process.is_main:
                report_tasks(results, fewer_bits, {"limit": limit}, as_json)
            return
        stride = _stride(stride, judged.model.config.context_length)
        held_out = _held_out(text, source, max_tokens, config, judged.tokenizer)
        found = _on_text(judged, held_out, stride, process)
        if kind != "none":
            before = found.loss
            quantize_(judged.model, kind)
            found = _on_text(fewer_bits, held_out, stride, process)
            if process.is_main:
                cost = f"loss {before:.4f} -> {found.loss:.4f} ({found.loss - before:+.4f}), "
                cost += f"perplexity {math.exp(before):.3f} -> {math.exp(found.loss):.3f}"
                print(f"Weights in {kind} instead of as they were saved: {cost}", file=sys.stderr)
        if process.is_main:
            _report(found, fewer_bits, held_out, stride, fewer_bits.files(_name(text, source)), as_json)


def _on_text(judged: Judged, held_out: HeldOut, stride: int, process: Process) -> Evaluation:
    bars = progress()
    bar = bars.add_task("Evaluating", total=len(held_out.tokens) - 1)
    with bars if process.is_main else nullcontext():
        return judged.on_text(held_out, stride, lambda targets: bars.advance(bar, targets))


def _refuse_mixture(options: Mapping[str, Any], tasks: bool) -> None:
    for option, value in options.items():
        if value is not None:
            other = "is for text, and does not go with --tasks" if tasks else "goes with --tasks, such as --tasks quern"
            raise UserError(f"{option} {other}.")


def _open(checkpoint: str, config: Config, process: Process, batch_size: int | None) -> Judged:
    from data.tokenization.matching import matching_tokenizer
    from evaluation.judged import Judged
    from model.checkpoint import load_model
    from model.checkpoint_folder import resolve_checkpoint
    from training.precision import Precision

    path = resolve_checkpoint(checkpoint, Path(config.training.checkpoint_dir))
    model, info = load_model(path, process.device)
    places = [config.data.tokenizer_dir, info.config["data"]["tokenizer_dir"]]
    precision = Precision(config.training.precision, process.device)
    return Judged(
        model=model,
        info=info,
        tokenizer=matching_tokenizer(info.tokenizer_fingerprint, [Path(place) for place in places]),
        precision=precision.name,
        autocast=precision.dtype if precision.mixed else None,
        runs_dir=Path(config.training.runs_dir),
        batch_size=batch_size,
        rank=process.rank,
        world_size=process.world_size,
    )


def _stride(stride: int | None, context_length: int) -> int:
    if stride is not None and stride > context_length:
        raise UserError(
            f"--stride {stride} would skip tokens: the model sees {context_length} at once, so that is the largest."
        )
    return stride or max(1, context_length // 2)


def _held_out(
    text: Sequence[Path] | None, source: str | None, max_tokens: int, config: Config, tokenizer: Tokenizer
) -> HeldOut:
    from evaluation.held_out import source_documents, text_files, validation_split

    if source is not None:
        return source_documents(source, config.data, tokenizer, max_tokens)
    return text_files(text, tokenizer) if text else validation_split(config.data, tokenizer)


def _name(text: Sequence[Path] | None, source: str | None) -> str:
    what = source or "-".join(path.stem for path in text or [])
    return f"evaluation-{what[:100]}" if what else "evaluation"


def _write(judged: Judged, writings: Sequence[Writing]) -> list[str]:
    """The texts that a task asks to be written, each process writing its share."""
    import torch

    from inference.engine import Engine, Request
    from inference.sampling import SamplingSettings

    numbers = range(judged.rank, len(writings), judged.world_size)
    requests = [
        Request(
            one.prompt,
            one.max_new_tokens,
            SamplingSettings(one.temperature, one.top_k, one.top_p, one.min_p),
            stop=one.stop,
            answer=True,
        )
        for one in (writings[number] for number in numbers)
    ]
    texts = [""] * len(writings)
    device = judged.model.token_embedding.weight.device.type
    with torch.autocast(device, dtype=judged.autocast, enabled=judged.autocast is not None):
        for piece in Engine(judged.model, judged.tokenizer, judged.batch_size or SLOTS).generate(requests):
            texts[numbers[piece.sequence]] += piece.text
    if judged.world_size == 1:
        return texts
    gathered: list[list[str]] = [[]] * judged.world_size
    torch.distributed.all_gather_object(gathered, texts)
    return [gathered[number % judged.world_size][number] for number in range(len(texts))]


def _report(
    found: Evaluation, judged: Judged, held_out: HeldOut, stride: int, files: Sequence[Path], as_json: bool
) -> None:
    from config.files import write_text
    from evaluation.report import print_table, to_json

    context_length = judged.model.config.context_length
    about = {
        **judged.about,
        "text": held_out.name,
        "context_length": context_length,
        "stride": stride,
        "tokenizer_fingerprint": judged.info.tokenizer_fingerprint,
    }
    sources = held_out.by_source(found, context_length)
    report = to_json(found, about, sources)
    for path in files:
        write_text(path, report)
    if as_json:
        print(report, end="")
    else:
        print_table(found, f"{judged.info.path} (step {judged.info.step:,}) on {held_out.name}", sources)
    where = sys.stderr if as_json else sys.stdout
    print(f'Written to {files[0]}. Next: python scripts/generate.py --prompt "The future of AI is"', file=where)


def main() -> None:
    """Run the command."""
    run(evaluate)


if __name__ == "__main__":
    main()
