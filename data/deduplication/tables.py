"""Tables on disk, the one place where deduplication reads and writes files: sorted rows, cut by ranges of their keys.

Every part of the corpus writes its rows sorted by key, and beside them where each of `cuts` equal ranges of keys
begins. Whoever owns a range reads just that from each part: so what is equal meets, in memory that `cuts` bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.files import atomic_write

CUT_BYTES = 64 << 20  # of rows that the owner of a range holds in memory


def cuts_for(rows: int, row_bytes: int) -> int:
    """How many ranges keep so many rows within memory."""
    return max(1, math.ceil(rows * row_bytes / CUT_BYTES))


def borders(keys: NDArray[Any], bits: int, cuts: int) -> NDArray[np.int64]:
    """Where each of `cuts` equal ranges of `bits`-bit integers begins in ascending `keys`, and the end; (cuts + 1,)."""
    starts = np.array([-(-(cut << bits) // cuts) for cut in range(1, cuts)], np.uint64)
    inner = np.searchsorted(keys, starts.astype(keys.dtype))
    return np.concatenate([[0], inner, [len(keys)]]).astype(np.int64)


def write_rows(path: Path, rows: NDArray[Any]) -> None:
    """Write an array as it lies in memory; atomic."""
    with atomic_write(path) as file:
        file.write(np.ascontiguousarray(rows).tobytes())


def read_rows(path: Path, dtype: np.dtype[Any], first: int = 0, last: int | None = None) -> NDArray[Any]:
    """Rows `first` ... `last` (the end) of a file that `write_rows` made."""
    with path.open("rb") as file:
        file.seek(first * dtype.itemsize)
        return np.frombuffer(file.read(-1 if last is None else (last - first) * dtype.itemsize), dtype)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array with its shape and type; atomic."""
    with atomic_write(path) as file:
        np.save(file, array)


def read_array(path: Path) -> NDArray[Any]:
    """What `write_array` wrote."""
    with path.open("rb") as file:
        array: NDArray[Any] = np.load(file)
    return array


def read_slices(
    slices: Iterable[tuple[Path, int, int]], kind: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.uint32]]:
    """The rows first ... last - 1 of each of several files, one file after the other, and the number of each's file."""
    parts = [read_rows(path, kind, first, last) for path, first, last in slices]
    return np.concatenate(parts), np.repeat(np.arange(len(parts), dtype=np.uint32), [len(rows) for rows in parts])
