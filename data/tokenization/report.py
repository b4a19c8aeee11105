"""What a person sees of a trained tokenizer: its size, how far it compresses, and how it splits some text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from config.schema import TokenizerConfig
    from data.tokenization.build import Built
    from data.tokenization.protocol import Tokenizer

STYLES = ("black on bright_cyan", "black on bright_yellow")
SAMPLE = "The future of AI is open: café, 東京, 3.14159 👍"
SAMPLE_CHARACTERS = 50
BORDER = "│"


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """UTF-8 bytes of `texts` divided by the number of their tokens; more is better compression."""
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / tokens if tokens else 0.0


def split_text(tokenizer: Tokenizer, text: str) -> Text:
    """One line that shows where the tokens of `text` begin and end: spaces as `·`, line ends as `⏎`, parts of a
    character as their bytes."""
    from rich.text import Text

    line = Text()
    for number, index in enumerate(tokenizer.encode(text)):
        token = tokenizer.decode_bytes([index]).decode(errors="backslashreplace")
        line.append(BORDER if number else "", style="dim")
        line.append(token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥"), style=STYLES[number % 2])
    return line


def sample_lines(texts: Sequence[str], count: int = 3) -> list[str]:
    """One line of some length from each of `count` texts that lie far apart; always the same ones."""
    lines = []
    for text in texts[:: max(1, len(texts) // count)]:
        candidates = [line for line in text.splitlines() if SAMPLE_CHARACTERS // 2 < len(line) <= SAMPLE_CHARACTERS]
        if candidates:
            lines.append(candidates[len(candidates) // 2])
    return [SAMPLE, *lines[:count]]


def print_report(built: Built, config: TokenizerConfig, before: str | None) -> None:
    """Print size, compression and sample splits of a new tokenizer, and whether it replaces one (`before`)."""
    from rich.console import Console
    from rich.text import Text

    from data.listing import format_bytes

    tokenizer, corpus = built.tokenizer, built.corpus
    size = format_bytes(min(corpus.bytes, config.max_training_bytes))
    print(f"trained on   {corpus.documents:,} documents, {size}, in {built.seconds:.1f} s")
    if corpus.unreadable:
        print(f"left out     {corpus.unreadable:,} records that could not be read")
    few = f"; {config.vocab_size:,} were asked for, but no other pair of tokens stands twice in this text"
    special = f"{len(tokenizer.special_tokens)} of them special"
    print(f"vocabulary   {tokenizer.vocab_size:,} tokens, {special}{few * (tokenizer.vocab_size < config.vocab_size)}")
    texts = corpus.held_out or corpus.first
    kept_back = f"{len(texts):,} document{'s' * (len(texts) > 1)} kept back for this"
    where = kept_back if corpus.held_out else "the training text, which is short"
    print(f"compression  {bytes_per_token(tokenizer, texts):.2f} bytes per token, on {where}")
    print(f"encoder      {built.encoder}")
    console = Console(highlight=False)
    for number, line in enumerate(sample_lines([*corpus.held_out, *corpus.first])):
        label = Text("             " if number else "samples      ")
        console.print(label + split_text(tokenizer, line), soft_wrap=True)
    if before == tokenizer.fingerprint:
        print("It is the same as the tokenizer that was there, so token files and models still match.")
    elif before is not None:
        print("It replaces the tokenizer that was there: token files and models made with that one no longer match.")
