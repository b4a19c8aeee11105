"""A readable and seekable file of which a window is in memory, wherever the rest of it is."""

from __future__ import annotations

import io
from abc import abstractmethod


class WindowedFile(io.RawIOBase):
    """A file read through `_window`, the bytes from `_start` on; `_position` is that of the next read."""

    def __init__(self) -> None:
        self._position = 0
        self._start = 0
        self._window = bytearray()

    @abstractmethod
    def _reach(self, wanted: int) -> bool:
        """Move the window to where it holds the next byte and, at best, `wanted` of them; False at the end."""

    @abstractmethod
    def _end(self) -> int:
        """The length of the file in bytes."""

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
        """Move to `offset` from the beginning, the position or the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        self._position = max((base[whence] if whence in base else self._end()) + offset, 0)
        return self._position

    def readinto(self, target: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `target` as far as the window goes."""
        inside = self._start <= self._position < self._start + len(self._window)
        if not target or not (inside or self._reach(len(target))):
            return 0
        begin = self._position - self._start
        length = min(len(target), len(self._window) - begin)
        target[:length] = memoryview(self._window)[begin : begin + length]
        self._position += length
        return length
