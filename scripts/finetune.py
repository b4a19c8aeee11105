"""Teach a trained model what to say, from examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import (
    Deterministic,
    Overrides,
    PrintConfig,
    Profile,
    Recipe,
    Resume,
    progress,
    run,
    with_determinism,
)
from training.signals import expect_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from data.examples.reading import Example
    from evaluation.pairs import PairJudge
    from evaluation.perplexity import Evaluation
    from model.transformer import Transformer
    from training.finetuning import Finetuning
    from training.trainer import TrainResult

Dataset = Annotated[
    Path | None,
    typer.Option(
        "--dataset",
        metavar="FILE|FOLDER",
        help="Examples: a .jsonl (.gz, .zst) or .parquet file, or a folder of Parquet files or of a downloaded "
        "set, such as corpus/raw/smoltalk.",
    ),
]
Validation = Annotated[
    Path | None,
    typer.Option(
        "--validation", metavar="FILE|FOLDER", help="Examples to validate on, instead of holding out a tenth."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="KEY=COLUMN",
        help="Which column of the set stands for a key of an example, such as prompt=question or "
        "completion=answer.text; may be repeated.",
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="PATH|latest", help="Where to start from: the latest pre-trained by default."),
]
Preview = Annotated[
    int, typer.Option("--preview", metavar="N", min=0, help="Show N examples, what is trained in green, and stop.")
]


def finetune(
    overrides: Overrides = None,
    dataset: Dataset = None,
    validation: Validation = None,
    columns: Columns = None,
    checkpoint: Checkpoint = None,
    recipe: Recipe = None,
    resume: Resume = None,
    preview: Preview = 0,
    deterministic: Deterministic = False,
    profile: Profile = False,
    print_config: PrintConfig = False,
) -> None:
    """Teach a trained model what to say, from examples.

    An example is {"prompt": ..., "completion": ...}, {"messages": [{"role": ...,
    "content": ...}, ...]} or {"text": ...}. Completions and what the assistant says
    are trained; text is trained from its beginning. Of {"prompt": ..., "chosen": ...,
    "rejected": ...} the model learns to prefer the chosen answer (DPO), with
    --config config/recipes/dpo.yaml. Settings: config/recipes/finetune.yaml.
    """
    from model.waiting import watch_cores

    watch_cores()
    from config.load import to_yaml
    from training.finetuning import Asked, open_finetuning, starting_config
    from training.introduction import introduce, show_examples

    settings = with_determinism(overrides, deterministic)
    asked = Asked(dataset, validation, checkpoint, resume, [recipe] if recipe else [], settings, columns or [])
    if print_config:
        print(to_yaml(starting_config(asked)[0]), end="")
        raise typer.Exit()
    with progress() as bar:
        job = open_finetuning(asked, lambda examples, what: bar.track(examples, description=what))
    if preview:
        show_examples(job, preview)
        return
    from training.preference_pairs import require_objective

    require_objective(job)
    import os
    from dataclasses import replace

    from evaluation.run_report import write_page
    from training.adapters import describe, is_adapted
    from training.determinism import determinism
    from training.objectives import DirectPreference
    from training.starting_model import starting_model
    from training.trainer import train

    introduce(job)
    judge = _judge(job) if job.pairs else None
    evaluate = judge.evaluate if judge else _evaluator(job)
    with determinism(job.config.training.deterministic):
        model = starting_model(job, evaluate)
    if model is not None and is_adapted(model) and not int(os.environ.get("RANK", 0)):
        print(describe(model, job.config.training.adapter))
    result = train(
        job.config,
        job.source,
        tokenizer_fingerprint=job.tokenizer.fingerprint,
        data_fingerprint=job.source.fingerprint,
        evaluate=evaluate,
        ask=_asker(job),
        sampler=_sampler(job) if job.config.training.sample_interval else None,
        model=model,
        resume=job.resume,
        finetuning=job.about,
        objective=DirectPreference(judge.settings, job.about, judge.references) if judge else None,
        recipe=starting_config(replace(asked, overrides=[]))[0] if job.resume is None else None,
        page=write_page,
        profile=profile,
    )
    if result.is_main:
        _report(job, result)
    if result.stopped_by:
        raise typer.Exit(128 + result.stopped_by)


def _evaluator(job: Finetuning) -> Callable[[Transformer, int, int], Evaluation]:
    """The loss of the trained tokens of all held-out examples."""
    from evaluation.examples import evaluate_samples
    from evaluation.perplexity import default_batch_size
    from training.precision import Precision

    def evaluate(model: Transformer, rank: int, world_size: int) -> Evaluation:
        device = model.output_weight.device
        precision = Precision(job.config.training.precision, device)
        return evaluate_samples(
            model,
            job.validation,
            batch_size=default_batch_size(job.validation.length, model.config.padded_vocab_size, device),
            device=device,
            rank=rank,
            world_size=world_size,
            autocast=precision.dtype if precision.mixed else None,
        )

    return evaluate


def _judge(job: Finetuning) -> PairJudge:
    """What measures pairs of answers, to train on and to validate on."""
    from evaluation.pairs import PairJudge
    from training.precision import Precision

    def autocast(device: torch.device) -> torch.dtype | None:
        precision = Precision(job.config.training.precision, device)
        return precision.dtype if precision.mixed else None

    return PairJudge(job.train, job.validation, job.config.training.dpo, job.about, autocast)


def _asker(job: Finetuning) -> Callable[[Transformer, int, int], float] | None:
    """The share of the questions of the project that the model answers rightly, where they are asked."""
    training = job.config.training
    if training.task_interval is None:
        return None
    from evaluation.questions import questions
    from training.precision import Precision

    put = questions(job.config.data, job.tokenizer, training.task_questions)

    def ask(model: Transformer, rank: int, world_size: int) -> float:
        precision = Precision(training.precision, model.output_weight.device)
        return put(model, rank, world_size, precision.dtype if precision.mixed else None)

    return ask


def _sampler(job: Finetuning) -> Callable[[Transformer], str]:
    """What the model answers to a held-out example, always the same one, with the likeliest token every time."""
    from data.examples.encoding import split_answer
    from inference.answers import greedy_answers

    prompt, answer = split_answer(job.validation.encoded(0))
    question = prompt.tolist(), int(answer[-1])
    asked = job.tokenizer.decode(prompt, skip_special_tokens=True)

    def sample(model: Transformer) -> str:
        model.eval()
        ((text, _),) = greedy_answers(model, job.tokenizer, [question], job.config.generation.max_new_tokens)
        return f"{asked} => {text}"

    return sample


def _answer(job: Finetuning, directory: Path, tuned: Path) -> bool:
    """Let the checkpoint it began with and the `tuned` one answer held-out prompts, for the page of the run."""
    from config.errors import UserError
    from evaluation.answering import write_before_after
    from evaluation.before_after import spread
    from evaluation.run_report import write_page
    from inference.answers import greedy_answers
    from model.devices import choose_device
    from training.precision import Precision

    most = job.config.data.finetuning.before_after
    if not most:
        return False
    device = choose_device(job.config.training.device)
    precision = Precision(job.config.training.precision, device)
    try:
        write_before_after(
            directory,
            (job.start, tuned),
            job.questions,
            spread(len(job.questions), most),
            job.tokenizer,
            lambda model, asked: greedy_answers(model, job.tokenizer, asked, job.config.generation.max_new_tokens),
            device,
            precision.dtype if precision.mixed else None,
        )
    except UserError as error:
        print(f"No prompts were answered for the page of the run: {error}")
        return False
    write_page(directory)
    return True


def _report(job: Finetuning, result: TrainResult) -> None:
    """The last lines: what was learned and written, and what to type next."""
    import math
    import shlex

    from training.ending import told_best, told_end

    resumed = f"python scripts/finetune.py --resume {shlex.quote(str(result.checkpoint))}"
    if told_end(result, resumed, "training.epochs=N, with more of them than before."):
        return
    loss, before = result.validation_loss, job.about["loss_before"]
    assert loss is not None
    learnt = (
        f"Loss on {len(job.validation):,} held-out examples: {before:.4f} before, {loss:.4f} after "
        f"(perplexity {math.exp(before):.2f} before, {math.exp(loss):.2f} after)."
    )
    if job.pairs:
        from evaluation.pairs import learnt_of_pairs

        learnt = learnt_of_pairs(result.run_dir, len(job.questions), before, loss)
    print(learnt)
    best, prompt = told_best(result), _prompt(job.probe)
    answered = best is not None and _answer(job, result.run_dir, best)
    print(
        f"Wrote {result.checkpoint} and {result.run_dir}/report.html"
        + (", with held-out prompts answered before and after." if answered else ".")
    )
    print(f"Next: python scripts/generate.py --checkpoint {shlex.quote(str(best))}{prompt}")


def _prompt(probe: Example) -> str:
    """A held-out prompt as an option of generate.py; none where it is no single line, which are better typed."""
    import shlex

    from data.examples.preferences import PreferenceExample
    from data.examples.reading import ChatExample, CompletionExample

    prompt = probe.prompt if isinstance(probe, CompletionExample | PreferenceExample) else ""
    if isinstance(probe, ChatExample) and [message["role"] for message in probe.messages] == ["user", "assistant"]:
        prompt = probe.messages[:1]
    if not isinstance(prompt, str):
        prompt = prompt[0]["content"] if [message["role"] for message in prompt] == ["user"] else ""
    return f" --prompt {shlex.quote(prompt)}" if prompt and "\n" not in prompt and len(prompt) < 200 else ""


def main() -> None:
    """Run the command line."""
    expect_signals()
    run(finetune)


if __name__ == "__main__":
    main()
