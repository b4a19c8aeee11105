"""Train a language model on the token files: fresh, or on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from config.command import (
    Deterministic,
    Overrides,
    PrintConfig,
    Profile,
    Recipe,
    Resume,
    resolve,
    run,
    show,
    with_determinism,
)
from training.signals import expect_signals

Reproduce = Annotated[
    Path | None,
    typer.Option(
        "--reproduce",
        metavar="runs/NAME",
        help="Run that run again, and say whether the result is the same bit for bit.",
    ),
]

if TYPE_CHECKING:
    from collections.abc import Callable

    from config.schema import Config
    from evaluation.perplexity import Evaluation
    from model.transformer import Transformer
    from training.pretraining import Pretraining
    from training.trainer import TrainResult


def train(
    recipe: Recipe = None,
    overrides: Overrides = None,
    resume: Resume = None,
    deterministic: Deterministic = False,
    profile: Profile = False,
    reproduce: Reproduce = None,
    print_config: PrintConfig = False,
) -> None:
    """Train a language model on the token files: fresh, or on from a checkpoint.

    Reads corpus/tokens/, writes checkpoints/model_step_N.pt and the record of
    the run to runs/NAME/. Ctrl-C finishes the step, saves, and says how to go on.
    For several GPUs use scripts/distributed_train.py. With --reproduce, a run is
    run again and told whether it came to the same bits: the exit status is 1 if not.
    """
    from model.waiting import watch_cores

    settings = with_determinism(overrides, deterministic)
    if reproduce is not None:
        _refuse_beside_reproduce(recipe, resume)
        return _reproduce(reproduce, settings, print_config)
    if resume is None:
        resolve(recipe, settings, print_config)
    watch_cores()
    from config.load import load_config
    from training.pretraining import open_pretraining
    from training.restarts import AUTO, own_checkpoint
    from training.resume import run_config

    recipes, restarting = [recipe] if recipe else [], resume == AUTO
    if restarting:
        resume = own_checkpoint(recipes, settings)
    config, checkpoint = run_config(recipes, settings, resume)
    show(config, print_config)
    job = open_pretraining(config, checkpoint)
    _describe(job)
    result = _train(
        job,
        load_config(recipes) if checkpoint is None else None,
        resume=checkpoint,
        profile=profile,
        keep_name=restarting,
    )
    if result.is_main:
        _report(result)
    if result.stopped_by:
        raise typer.Exit(128 + result.stopped_by)


def _train(job: Pretraining, recipe: Config | None, **options: Any) -> TrainResult:
    """Train `job`, whose settings the page of the run compares with those of `recipe`."""
    from evaluation.run_report import write_page
    from training import trainer

    return trainer.train(
        job.config,
        job.source,
        tokenizer_fingerprint=job.tokenizer_fingerprint,
        data_fingerprint=job.data_fingerprint,
        evaluate=evaluator(job),
        ask=_asker(job),
        sampler=_sampler(job),
        recipe=recipe,
        page=write_page,
        **options,
    )


def _refuse_beside_reproduce(recipe: Path | None, resume: str | None) -> None:
    from config.errors import UserError

    for option, value in (("--config", recipe), ("--resume", resume)):
        if value is not None:
            raise UserError(f"--reproduce takes everything from the run's folder. Leave {option} out.")


def _reproduce(directory: Path, settings: list[str], print_config: bool) -> None:
    """Run the run of `directory` again, under another name, and say whether it came to the same bits."""
    from model.waiting import watch_cores

    watch_cores()
    import os

    import torch

    from config.files import local
    from data.tokens import TokenFiles
    from training.pretraining import open_pretraining
    from training.reproduction import environment_of, open_original

    original = open_original(directory)
    config = original.config(settings)
    show(config, print_config)
    manifest = TokenFiles(local(config.data.tokens_dir, "data.tokens_dir"), "train").manifest
    original.require_same_data(manifest.tokenizer_fingerprint, manifest.fingerprint)
    job = open_pretraining(config, None)
    torch.set_num_threads(original.last_start["threads"])
    if not int(os.environ.get("RANK", 0)):
        for change in original.changes(job.config, environment_of(job.config)):
            print(f"warning: {change}.")
    result = _train(job, original.config([]))
    if result.stopped_by:
        raise typer.Exit(128 + result.stopped_by)
    if result.is_main:
        same, told = original.compare(result.run_dir)
        print(told)
        raise typer.Exit(0 if same else 1)


def _describe(job: Pretraining) -> None:
    """What packing made of the documents."""
    import os

    from data.packing import PackedWindows

    if isinstance(job.source, PackedWindows) and not int(os.environ.get("RANK", 0)):
        documents, windows = job.source.tokens.manifest.documents("train"), len(job.source)
        print(f"{documents:,} documents packed into {windows:,} windows; padding is {job.source.padding:.2%} of them.")


def evaluator(job: Pretraining) -> Callable[[Transformer, int, int], Evaluation]:
    """The loss on the first `training.eval_tokens` tokens of the validation split, the same ones every time.

    What the model sees of their documents is what it sees in training.
    """
    from config.errors import UserError
    from config.files import local
    from data.tokens import TokenFiles
    from evaluation.perplexity import default_batch_size, evaluate_tokens
    from training.precision import Precision

    config, length, masked = job.config, job.source.context_length, job.source.with_documents
    tokens = TokenFiles(local(config.data.tokens_dir, "data.tokens_dir"), "val")
    if len(tokens) < 2:
        raise UserError(
            f"The validation split in {config.data.tokens_dir} is empty, so nothing can be evaluated. "
            "Raise data.preprocess.validation_fraction or add text, and run python data/preprocess.py."
        )

    def evaluate(model: Transformer, rank: int, world_size: int) -> Evaluation:
        device = model.output_weight.device
        precision = Precision(config.training.precision, device)
        return evaluate_tokens(
            model,
            tokens,
            context_length=length,
            stride=length,
            batch_size=default_batch_size(length, model.config.padded_vocab_size, device),
            device=device,
            document_ends=tokens.document_ends if masked else None,
            max_tokens=config.training.eval_tokens,
            rank=rank,
            world_size=world_size,
            autocast=precision.dtype if precision.mixed else None,
        )

    return evaluate


def _asker(job: Pretraining) -> Callable[[Transformer, int, int], float] | None:
    """The share of the questions of the project that a model answers rightly, where they are asked."""
    config = job.config
    if config.training.task_interval is None:
        return None
    from data.tokenization import load_tokenizer
    from data.tokens import check_tokens
    from evaluation.questions import questions
    from training.precision import Precision

    tokenizer = load_tokenizer(Path(config.data.tokenizer_dir))
    check_tokens(job.source.tokens.manifest, tokenizer.fingerprint, tokenizer.vocab_size)
    put = questions(config.data, tokenizer, config.training.task_questions)

    def ask(model: Transformer, rank: int, world_size: int) -> float:
        precision = Precision(config.training.precision, model.output_weight.device)
        return put(model, rank, world_size, precision.dtype if precision.mixed else None)

    return ask


def _sampler(job: Pretraining) -> Callable[[Transformer], str] | None:
    """A text that continues `training.sample_prompt`, always from the same seed, so that texts over time compare."""
    config = job.config
    if not config.training.sample_interval:
        return None
    from data.tokenization import load_tokenizer
    from data.tokens import check_tokens
    from inference.prompting import sample_text

    tokenizer = load_tokenizer(Path(config.data.tokenizer_dir))
    check_tokens(job.source.tokens.manifest, tokenizer.fingerprint, tokenizer.vocab_size)

    def sample(model: Transformer) -> str:
        return sample_text(model, tokenizer, config.training.sample_prompt, config.generation)

    return sample


def _report(result: TrainResult) -> None:
    """The last lines: what was written, and what to type next."""
    import math
    import shlex

    from training.ending import told_best, told_end
    from training.launch import resume_command

    if told_end(result, resume_command(result.checkpoint), f"training.max_steps={2 * result.steps}"):
        return
    loss = result.validation_loss
    if loss is not None:
        print(f"Trained to step {result.step:,}: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}.")
    best, command = told_best(result), "python scripts/eval.py"
    if best != result.checkpoint:
        command += f" --checkpoint {shlex.quote(str(best))}"
    print(f"Wrote {result.checkpoint} and {result.run_dir}/ (report.html, metrics.jsonl). Next: {command}")


def main() -> None:
    """Run the command line."""
    expect_signals()
    run(train)


if __name__ == "__main__":
    main()
