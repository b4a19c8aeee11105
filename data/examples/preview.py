"""Encoded examples as a person checks them: what the model reads, and what it is trained to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data.examples.encoding import Encoded

if TYPE_CHECKING:
    from rich.text import Text

    from data.tokenization import Tokenizer

OPENING, CLOSING = "⟦", "⟧"


def segments(tokenizer: Tokenizer, encoded: Encoded) -> list[tuple[str, bool]]:
    """The text of an example, special tokens included, cut where the trained flag changes."""
    borders = np.flatnonzero(np.diff(encoded.trained)) + 1
    runs = np.split(encoded.ids, borders)
    flags = encoded.trained[[0, *borders]]
    texts = [tokenizer.decode_bytes(run.tolist()).decode(errors="replace") for run in runs]
    return [(text, bool(flag)) for text, flag in zip(texts, flags, strict=True)]


def render(tokenizer: Tokenizer, encoded: Encoded, trained_style: str = "bold green") -> Text:
    """The same in two colours; trained parts stand in brackets as well, for eyes and files without colours."""
    from rich.text import Text

    text = Text()
    for part, trained in segments(tokenizer, encoded):
        text.append(f"{OPENING}{part}{CLOSING}" if trained else part, style=trained_style if trained else "dim")
    return text


def render_pair(tokenizer: Tokenizer, chosen: Encoded, rejected: Encoded) -> Text:
    """The prompt with what was chosen in green, and below it what was rejected in red."""
    start = int(np.argmax(rejected.trained))
    text = render(tokenizer, chosen).append("\nrejected: ")
    return text.append_text(render(tokenizer, Encoded(rejected.ids[start:], rejected.trained[start:]), "bold red"))
