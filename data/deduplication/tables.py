"""Tables on disk, the one place where deduplication reads and writes files: sorted rows, cut by ranges of their keys.

Every part of the corpus writes its rows sorted by key, and beside them where each of `cuts` equal ranges of keys
begins. Whoever owns a range reads just that from each part: so what is equal meets, in memory that `cuts` bounds. The
beginnings of all parts are gathered in one file, so that this takes one file to open for each part and one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from config.files import atomic_write, disk_errors, scratch_file

CUT_BYTES = 64 << 20  # of rows that the owner of a range holds in memory
GRID = 1024  # ranges of keys of which a merge takes several at a time
START = np.dtype("<i8")


def cuts_for(rows: int, row_bytes: int) -> int:
    """How many ranges keep so many rows within memory."""
    return max(1, math.ceil(rows * row_bytes / CUT_BYTES))


def borders(keys: NDArray[Any], bits: int, cuts: int) -> NDArray[np.int64]:
    """Where each of `cuts` equal ranges of `bits`-bit integers begins in ascending `keys`, and the end; (cuts + 1,)."""
    starts = np.array([-(-(cut << bits) // cuts) for cut in range(1, cuts)], np.uint64)
    inner = np.searchsorted(keys, starts.astype(keys.dtype))
    return np.concatenate([[0], inner, [len(keys)]]).astype(np.int64)


class SortedRows:
    """Rows that come a few at a time and leave as one sorted file, in memory that `most` bytes bound.

    What exceeds it waits, sorted, in a nameless file until all are merged, range of keys by range of keys.

    Args:
        order: the indices that sort rows; equal ones stay as they came.
        key: what they are sorted by first, a column of integers of `bits` bits that are spread evenly.
        cuts: `write` gives the beginnings of so many ranges of the key.
    """

    def __init__(
        self,
        path: Path,
        kind: np.dtype[Any],
        order: Callable[[NDArray[Any]], NDArray[np.intp]],
        key: Callable[[NDArray[Any]], NDArray[Any]],
        bits: int,
        cuts: int,
        most: int,
    ) -> None:
        self._path = path
        self._kind = kind
        self._order = order
        self._key = key
        self._bits = bits
        self._most = most
        self._rows: list[NDArray[Any]] = []
        self._size = 0
        self._scratch: IO[bytes] | None = None
        self._runs: list[NDArray[np.int64]] = []  # of each run in the nameless file, the borders of the grid
        self._borders = np.zeros(cuts + 1, np.int64)

    def add(self, rows: NDArray[Any]) -> None:
        """Take some rows."""
        if self._size and self._size + rows.nbytes > self._most:
            self._spill()
        self._rows.append(rows)
        self._size += rows.nbytes

    def write(self) -> NDArray[np.int64]:
        """Write the file, atomically; where each of the ranges begins in it, and the end. Once, at the end."""
        if self._scratch is None:
            write_rows(self._path, self._take())
            return self._borders
        self._spill()
        with self._scratch, atomic_write(self._path) as file:
            size = int(self._borders[-1]) * self._kind.itemsize
            groups = min(GRID, math.ceil(size / self._most))
            for group in range(groups):
                first, last = (GRID * at // groups for at in (group, group + 1))
                file.write(self._sorted([self._read(run, first, last) for run in range(len(self._runs))]).tobytes())
        return self._borders

    def _take(self) -> NDArray[Any]:
        """The rows in memory, sorted and counted."""
        rows = self._sorted(self._rows)
        self._rows, self._size = [], 0
        self._borders += borders(self._key(rows), self._bits, len(self._borders) - 1)
        return rows

    def _spill(self) -> None:
        rows = self._take()
        with disk_errors(self._path):
            if self._scratch is None:
                self._scratch = scratch_file(self._path)
            self._scratch.seek(0, 2)
            self._scratch.write(rows.tobytes())
        self._runs.append(borders(self._key(rows), self._bits, GRID))

    def _read(self, run: int, first: int, last: int) -> NDArray[Any]:
        """The rows of ranges first ... last - 1 of the grid in one run."""
        assert self._scratch is not None
        before = sum(int(earlier[-1]) for earlier in self._runs[:run])
        start, end = self._runs[run][[first, last]].tolist()
        self._scratch.seek((before + start) * self._kind.itemsize)
        return np.frombuffer(self._scratch.read((end - start) * self._kind.itemsize), self._kind)

    def _sorted(self, rows: list[NDArray[Any]]) -> NDArray[Any]:
        whole = np.concatenate([np.empty(0, self._kind), *rows])
        return whole[self._order(whole)]


def write_rows(path: Path, rows: NDArray[Any]) -> None:
    """Write an array as it lies in memory; atomic."""
    with atomic_write(path) as file:
        file.write(np.ascontiguousarray(rows).tobytes())


def read_rows(path: Path, dtype: np.dtype[Any], first: int = 0, last: int | None = None) -> NDArray[Any]:
    """Rows `first` ... `last` (the end) of a file that `write_rows` made."""
    with path.open("rb") as file:
        file.seek(first * dtype.itemsize)
        return np.frombuffer(file.read(-1 if last is None else (last - first) * dtype.itemsize), dtype)


def gather_starts(folder: Path, parts: int, path: Path) -> None:
    """Bring what `SortedRows.write` gave of every part (`00000.starts`, one table or several) into one file.

    Does nothing where that is there. Each range has a row, in which stands where it begins in each part, so whoever
    owns a range reads two rows.
    """
    if not path.exists():
        starts = [read_rows(folder / f"{part:05d}.starts", START) for part in range(parts)]
        write_rows(path, np.stack(starts, axis=1))


def read_starts(path: Path, parts: int, first: int, last: int) -> list[tuple[int, int]]:
    """Of each part, where range `first` begins and where range `last`."""
    kind = np.dtype((START, (parts,)))
    with path.open("rb") as file:
        rows = []
        for row in (first, last):
            file.seek(row * kind.itemsize)
            rows.append(np.frombuffer(file.read(kind.itemsize), START).tolist())
    return list(zip(*rows))


def read_slices(
    files: Sequence[Path], bounds: Iterable[tuple[int, int]], kind: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.uint32]]:
    """The rows first ... last - 1 of each of several files, one file after the other, and the number of each's file."""
    parts = [
        read_rows(path, kind, first, last) if last > first else np.empty(0, kind)
        for path, (first, last) in zip(files, bounds)
    ]
    return np.concatenate(parts), np.repeat(np.arange(len(parts), dtype=np.uint32), [len(rows) for rows in parts])
