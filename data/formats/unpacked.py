"""A packed file read as if it were not: forward as it is unpacked, back from memory or, if need be, from its start."""

from __future__ import annotations

from typing import IO

from data.formats.streams import BrokenStream, chunks
from data.transport.window import WindowedFile

KEPT = 4 << 20
"""Bytes behind the furthest one read that can be read again without unpacking the file once more."""


class Unpacked(WindowedFile):
    """The content of `file`, which the suffix of `path` says how to unpack; `broken` says why it ended early, if so.

    To find its end, all of it is unpacked.
    """

    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__()
        self.broken: str | None = None
        self._file = file
        self._path = path
        self._begin()

    def _reach(self, wanted: int) -> bool:
        if self._position < self._start:
            self._begin()
        while self._position >= self._start + len(self._window):
            if not self._unpack():
                return False
        return True

    def _end(self) -> int:
        while self._unpack():
            pass
        return self._start + len(self._window)

    def _begin(self) -> None:
        self._file.seek(0)
        self._chunks = chunks(self._file, self._path)
        self._window = bytearray()
        self._start = 0

    def _unpack(self) -> bool:
        """Bring the next piece into memory; False at the end."""
        try:
            piece = next(self._chunks, None)
        except BrokenStream as error:
            self.broken = error.reason
            return False
        if piece is None:
            return False
        if len(self._window) > 2 * KEPT:
            self._start += len(self._window) - KEPT
            del self._window[:-KEPT]
        self._window += piece
        return True
