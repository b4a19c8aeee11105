"""How sure the model was of each token: by colour at a terminal, as a list elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TextIO

from inference.engine import Piece

if TYPE_CHECKING:
    from data.tokenization import Tokenizer

# From sure to unsure, the same steps as on the server's page: the least probability, and a colour of 256.
STEPS = ((0.9, None), (0.65, 150), (0.4, 186), (0.2, 221), (0.07, 209), (0.0, 203))
ALTERNATIVES = 3


def takes_colours(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether colours are wanted there: a terminal that has them, and no NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


class Display(NamedTuple):
    """How probabilities are shown: by colour, of pieces that tell them, or as `rows`, or not at all.

    `logprobs` is what requests must ask for, as in `engine.Request`.
    """

    logprobs: int | None = None
    rows: Callable[[Piece], str] | None = None

    @property
    def coloured(self) -> bool:
        """Whether there is a legend to be shown."""
        return self.logprobs is not None and self.rows is None


def display_for(stream: TextIO, tokenizer: Tokenizer) -> Display:
    """Colours where `stream` takes them, else rows."""
    return Display(0) if takes_colours(stream) else Display(ALTERNATIVES + 1, partial(row, tokenizer=tokenizer))


def painted(text: str, probability: float) -> str:
    """`text` in the colour of a probability, line by line, so that no colour runs on over the end of one."""
    colour = next(colour for least, colour in STEPS if probability >= least)
    if colour is None:
        return text
    return "\n".join(f"\x1b[38;5;{colour}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def legend() -> str:
    """What the colours mean, in them."""
    bounds = [least for least, _ in STEPS[:-1]]
    names = [
        f"{100 * least:.0f} % and more" if place == 0 else f"{100 * least:.0f} %" for place, least in enumerate(bounds)
    ]
    parts = [painted(name, least) for name, least in zip([*names, "less"], [*bounds, 0.0], strict=True)]
    return "probability of a token: " + "  ".join(parts)


class Probabilities:
    """Follows the tokens of one text. What comes out with several of them has the colour of the unlikeliest."""

    def __init__(self) -> None:
        self._least = 1.0

    def of(self, piece: Piece) -> float:
        """The probability of the text that this piece makes certain."""
        assert piece.logprobs is not None
        least = min(self._least, math.exp(piece.logprobs.logprob))
        self._least = 1.0 if piece.text else least
        return least


def row(piece: Piece, tokenizer: Tokenizer) -> str:
    """A token with its probability, and the likeliest others in its place: a line of the list."""
    assert piece.logprobs is not None

    def named(token: int) -> str:
        return repr(tokenizer.decode_bytes([token]).decode(errors="replace"))

    others = [(token, value) for token, value in piece.logprobs.top if token != piece.token][:ALTERNATIVES]
    shown = ", ".join(f"{named(token)} {100 * math.exp(value):.1f} %" for token, value in others)
    return f"{100 * math.exp(piece.logprobs.logprob):5.1f} %  {named(piece.token)}  ({shown})\n"
