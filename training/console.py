"""What a person watching sees: one live line on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 80


class Console:
    """Writes to standard error, from the main process only. A live line never passes 80 columns."""

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._live = ""
        self._drawn = 0.0

    def status(self, text: str) -> None:
        """Replace the live line, at most ten times a second; nothing where there is no terminal."""
        if self._enabled and self._terminal and time.monotonic() - self._drawn > 0.1:
            self._draw(text)

    def progress(self, text: str) -> None:
        """A logged step: the live line on a terminal, a line of its own elsewhere."""
        if self._enabled and self._terminal:
            self._draw(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._enabled:
            return
        if self._live:
            self._stream.write("\r" + " " * len(self._live) + "\r")
        self._stream.write(text + "\n")
        if self._live:
            self._stream.write(self._live)
        self._stream.flush()

    def close(self) -> None:
        """Leave the live line where it stands."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
            self._live = ""

    def _draw(self, text: str) -> None:
        text = text[: WIDTH - 1]
        self._stream.write("\r" + text + " " * max(0, len(self._live) - len(text)))
        self._stream.flush()
        self._live, self._drawn = text, time.monotonic()


def count(number: float) -> str:
    """A number in at most five characters, up to 999T: 950, 12.3k, 4.1M, 20.0B."""
    scale, unit = 1.0, ""
    for larger in "kMBT":
        if number < 999.5 * scale:
            break
        scale, unit = 1e3 * scale, larger
    scaled = number / scale
    return f"{scaled:.0f}{unit}" if not unit or scaled >= 99.95 else f"{scaled:.1f}{unit}"


def size(number: float) -> str:
    """Bytes as people read them: 520MB, 1.2GB, 139.9GB."""
    return f"{number / 1e6:.0f}MB" if number < 999.5e6 else f"{number / 1e9:.1f}GB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:07, 12:30, 3:04:05, 4d 03:00."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
