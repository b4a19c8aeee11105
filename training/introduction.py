"""What a person reads before a fine-tuning run: its examples, their number, and what became of those too long."""

from __future__ import annotations

from training.finetuning import Finetuning


def show_examples(job: Finetuning, number: int) -> None:
    """The first examples, as the model will see them."""
    from rich.console import Console

    from data.examples.preview import CLOSING, OPENING, render, render_pair

    console = Console(highlight=False)
    for index in range(min(number, job.pairs.pairs if job.pairs else len(job.train))):
        console.rule(f"example {index + 1}", style="dim")
        if job.pairs:
            console.print(render_pair(job.tokenizer, *job.pairs.pair(index)))
        else:
            console.print(render(job.tokenizer, job.train.encoded(index)))
    console.rule(style="dim")
    print(_size(job))
    print(
        f"Trained is what stands in {OPENING}brackets{CLOSING}. Nothing was written. Next: the same without --preview."
    )


def _size(job: Finetuning) -> str:
    """The set in one line."""
    train, held = job.train, job.validation
    sides, examples = (2, "pairs") if job.pairs else (1, "examples")
    packed = sides * len(job.source)
    return (
        f"{len(train) // sides:,} {examples} to train on, {len(held) // sides:,} held out; {train.trained_tokens:,} of "
        f"{train.tokens:,} tokens are trained; the longest {examples[:-1]} fills {train.length:,} of "
        f"{job.about['context_length']:,} tokens."
        + (f" They are packed into {packed:,} sequences." if packed < len(train) else "")
    )


def introduce(job: Finetuning) -> None:
    """What will be trained, and what became of examples that were too long, so that nothing is cut in silence."""
    import os

    if int(os.environ.get("RANK", 0)):
        return
    print(f"{'Going on from' if job.resume else 'Starting from'} {job.newest}.")
    print(_size(job))
    for encoded in job.encoded:
        if encoded.too_long:
            left_out = f", {len(encoded.dropped):,} left out" if encoded.dropped else ""
            turns = f", {encoded.untrained_turns:,} early answers with it" if encoded.untrained_turns else ""
            print(
                f"{encoded.too_long:,} examples were longer than the context: {encoded.shortened:,} shortened{turns}"
                f"{left_out}{' (first: ' + encoded.dropped[0] + ')' if left_out else ''}."
            )
