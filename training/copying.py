"""Copying memory of the host beside a computation that has its cores first.

On Linux the thread that copies takes only what time the cores have left. Whoever can wait no longer takes part, from
the other end, until the two meet.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from typing import Any, NamedTuple

import numpy as np

PIECE = 2**20  # bytes
LARGE = 64 * 2**20  # bytes from which on it pays to load what copies faster
LOWEST_PRIORITY = 19


class Copy(NamedTuple):
    """`nbytes` to be copied from address `source`, which is memory of `owner`, to address `to`."""

    to: int
    source: int
    nbytes: int
    owner: object


class Copying:
    """Copies that are to be made. What is read may not change before `run` and `help` have returned."""

    def __init__(self) -> None:
        self._copies: list[Copy] = []
        self._pieces: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self._meeting = np.zeros(2, np.int64)

    def add(self, to: int, source: int, nbytes: int, owner: object) -> None:
        """Have `nbytes` copied; the memory of `owner` is not freed before that."""
        self._copies.append(Copy(to, source, nbytes, owner))

    def run(self) -> None:
        """Copy everything but what `help` takes. On Linux this may leave the thread with the lowest priority."""
        if sum(copy.nbytes for copy in self._copies) < LARGE:
            for copy in self._copies:
                ctypes.memmove(copy.to, copy.source, copy.nbytes)
        else:
            from training.streaming import copy_pieces

            pieces = self._cut()
            self._meeting[1] = len(pieces)
            self._pieces = pieces
            if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            copy_pieces(pieces, self._meeting, False)
        self._copies = []

    def help(self) -> None:
        """Copy what `run`, in another thread, has not come to; nothing where it has not begun, or needs no help."""
        copies = self._copies  # so that their owners stay
        if self._pieces is not None and copies:
            from training.streaming import copy_pieces

            copy_pieces(self._pieces, self._meeting, True)

    def _cut(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The copies as pieces of whole lines of the cache, (to, source, lines); the rest is copied at once."""
        from training.streaming import LINE

        pieces = []
        for to, source, nbytes, _ in self._copies:
            whole = 0 if to % LINE or source % LINE else nbytes - nbytes % LINE
            for begin in range(0, whole, PIECE):
                pieces.append((to + begin, source + begin, min(PIECE, whole - begin) // LINE))
            ctypes.memmove(to + whole, source + whole, nbytes - whole)
        return np.array(pieces, np.int64).reshape(-1, 3)


def prepare(nbytes: int) -> None:
    """Load what is needed to copy so much."""
    if nbytes >= LARGE:
        from training.streaming import prepare as load

        load()
