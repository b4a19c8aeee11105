"""Showing generated text to a person as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import TextIOWrapper
from typing import TextIO

from config.errors import UserError
from inference.colours import Probabilities, painted
from inference.engine import Piece

# What a model says may hold control characters, which could move the cursor or do worse: a terminal gets symbols.
_SYMBOLS: dict[int, int | None] = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_SYMBOLS |= {0x7F: 0x2421, **{code: 0xFFFD for code in range(0x80, 0xA0)}, ord("\r"): None}


class Printer:
    """Writes text at once; on a terminal, control characters but newline and tab as visible symbols."""

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a question mark
        self._stream = stream
        self._terminal = stream.isatty()
        self._at_line_start = True

    def write(self, text: str, probability: float = 1.0) -> None:
        """Show `text` now, at a terminal in the colour of a probability; see `colours`."""
        if text:
            self._at_line_start = text.endswith("\n")
            self._stream.write(painted(text.translate(_SYMBOLS), probability) if self._terminal else text)
            self._stream.flush()

    def end_line(self) -> None:
        """Go to a new line, unless the text is at the start of one."""
        if not self._at_line_start:
            self.write("\n")


class Samples:
    """Prints `count` samples that are generated together, one after the other.

    The first unfinished one is shown as it comes, the later ones wait. `begin(i)` is called before sample i. Where
    pieces tell probabilities, they are shown in colours; or, if there are `rows` of them, these are what is shown.
    `texts` and `tokens` (of all samples) hold what has come so far, also where `show` was interrupted.
    """

    def __init__(
        self,
        count: int,
        printer: Printer,
        begin: Callable[[int], None],
        rows: Callable[[Piece], str] | None = None,
    ) -> None:
        self.texts = [""] * count
        self.tokens = 0
        self._printer = printer
        self._begin = begin
        self._rows = rows
        self._probabilities = [Probabilities() for _ in range(count)]

    def show(self, pieces: Iterable[Piece]) -> None:
        """Take the pieces of `Engine.generate` and print them. Raises `UserError` where one could not go on."""
        count, current = len(self.texts), 0
        finished = [False] * count
        waiting: list[list[tuple[str, float]]] = [[] for _ in range(count)]
        self._begin(0)
        for piece in pieces:
            self.tokens += 1
            self.texts[piece.sequence] += piece.text
            finished[piece.sequence] = piece.finish is not None
            waiting[piece.sequence].append(self._shown(piece))
            self._write(waiting[current])
            if piece.failure is not None:
                self._printer.end_line()
                raise UserError(piece.failure)
            while current < count and finished[current]:
                self._printer.end_line()
                current += 1
                if current < count:
                    self._begin(current)
                    self._write(waiting[current])

    def _shown(self, piece: Piece) -> tuple[str, float]:
        if self._rows is not None:
            return self._rows(piece), 1.0
        return piece.text, 1.0 if piece.logprobs is None else self._probabilities[piece.sequence].of(piece)

    def _write(self, parts: list[tuple[str, float]]) -> None:
        for text, probability in parts:
            self._printer.write(text, probability)
        parts.clear()
