"""Showing generated text to a person as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import TextIOWrapper
from typing import TextIO

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

    def write(self, text: str) -> None:
        """Show `text` now."""
        if text:
            self._at_line_start = text.endswith("\n")
            self._stream.write(text.translate(_SYMBOLS) if self._terminal else text)
            self._stream.flush()

    def end_line(self) -> None:
        """Go to a new line, unless the text is at the start of one."""
        if not self._at_line_start:
            self.write("\n")


class Samples:
    """Prints `count` samples that are generated together, one after the other.

    The first unfinished one is shown as it comes, the later ones wait. `begin(i)` is called before sample i.
    `texts` and `tokens` (of all samples) hold what has come so far, also where `show` was interrupted.
    """

    def __init__(self, count: int, printer: Printer, begin: Callable[[int], None]) -> None:
        self.texts = [""] * count
        self.tokens = 0
        self._printer = printer
        self._begin = begin

    def show(self, pieces: Iterable[Piece]) -> None:
        """Take the pieces of `Engine.generate` and print them."""
        count, current = len(self.texts), 0
        finished = [False] * count
        self._begin(0)
        for piece in pieces:
            self.tokens += 1
            self.texts[piece.sequence] += piece.text
            finished[piece.sequence] = piece.finish is not None
            if piece.sequence == current:
                self._printer.write(piece.text)
            while current < count and finished[current]:
                self._printer.end_line()
                current += 1
                if current < count:
                    self._begin(current)
                    self._printer.write(self.texts[current])
