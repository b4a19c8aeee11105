"""A packed file read as if it were not: forward as it is unpacked, back from memory or, if need be, from its start."""

from __future__ import annotations

import io
from typing import IO

from data.formats.streams import BrokenStream, chunks

KEPT = 4 << 20
"""Bytes behind the furthest one read that can be read again without unpacking the file once more."""


class Unpacked(io.RawIOBase):
    """The content of `file`, which the suffix of `path` says how to unpack; `broken` says why it ended early, if so."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self.broken: str | None = None
        self._file = file
        self._path = path
        self._position = 0
        self._begin()

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position of the next read, in bytes of the content."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the beginning, the position or the end, for which all is unpacked."""
        if whence == io.SEEK_END:
            while self._unpack():
                pass
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._start + len(self._window)}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `target` as far as one piece goes."""
        if self._position < self._start:
            self._begin()
        while self._position >= self._start + len(self._window):
            if not self._unpack():
                return 0
        begin = self._position - self._start
        length = min(len(target), len(self._window) - begin)
        target[:length] = memoryview(self._window)[begin : begin + length]
        self._position += length
        return length

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
