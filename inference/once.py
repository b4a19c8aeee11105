"""One prompt, and what a model makes of it, at the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from config.schema import GenerationConfig
from inference.colours import Display, legend
from inference.engine import Engine
from inference.prompting import (
    best_texts,
    chat_prompt,
    chat_stop_tokens,
    constraint_of,
    make_requests,
    seed_of,
    with_token_ids,
)
from inference.terminal import Printer, Samples

if TYPE_CHECKING:
    from data.tokenization import Tokenizer
    from model.transformer import Transformer

NEXT = "Next: python scripts/generate.py to try more, python scripts/finetune.py --help to teach it."


def write_once(
    settings: GenerationConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    chat: bool,
    slots: int,
    display: Display = Display(),
) -> None:
    """Write the texts for a prompt to standard output, drawn ones as they come, and what they took to standard error.

    Up to `slots` samples are drawn together. With `chat`, the prompt is a message to be answered.
    """
    settings = with_token_ids(settings, tokenizer)
    context, stop_tokens = model.config.context_length, list[int]()
    if chat:
        ids, _ = chat_prompt(tokenizer, [{"role": "user", "content": text}], context, 0)
        stop_tokens = chat_stop_tokens(tokenizer)
    else:
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(text)]
    if len(ids) > context and settings.context != "stop":
        print(
            f"note: the prompt has {len(ids):,} tokens, the model sees {context:,} at once: the beginning is cut off.",
            file=sys.stderr,
        )
    seed = seed_of(settings)
    form = constraint_of(settings, tokenizer)
    requests = make_requests(settings, ids, seed, stop_tokens, form, display.logprobs, chat)
    printer, before = Printer(sys.stdout), "" if chat or display.rows is not None else text
    started = time.monotonic()
    if settings.beams > 1:
        found = best_texts(model, tokenizer, settings, requests[0])
        for place, each in enumerate(found):
            printer.write(f"--- text {place + 1}, score {each.score:.4f} ---\n" if len(found) > 1 else "")
            printer.write(before + each.text)
            printer.end_line()
        tokens, how = sum(len(each.tokens) for each in found), f"{settings.beams} beams"
    else:

        def begin(sample: int) -> None:
            printer.write(f"--- sample {sample + 1}, seed {seed + sample} ---\n" if len(requests) > 1 else "")
            printer.write(before)

        engine = Engine(model, tokenizer, min(slots, len(requests)), compiled=settings.compile)
        samples = Samples(len(requests), printer, begin, display.rows)
        samples.show(engine.generate(requests))
        if display.coloured:
            print(legend())
        tokens, how = samples.tokens, f"seed {seed}"
        if engine.proposed_tokens:
            how = f"{engine.accepted_tokens:,} of {engine.proposed_tokens:,} looked-up tokens accepted, {how}"
    seconds = time.monotonic() - started
    print(f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} a second), {how}. {NEXT}", file=sys.stderr)
