"""Texts as the kernels see them: the UTF-8 of a whole column in one array, and where each text ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from data.compiled import kernel


class Texts(NamedTuple):
    """`data[offsets[i]:offsets[i + 1]]` is text number i as UTF-8; uint8 and int64."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @property
    def longest(self) -> int:
        """Bytes of the longest text."""
        return int(np.diff(self.offsets).max(initial=0))


def texts_of(column: pl.Series) -> Texts:
    """The texts of a column without nulls; memory of its own, or the column's."""
    array = column.to_arrow(compat_level=pl.CompatLevel.oldest())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    _, offsets, data = array.cast(pa.large_string()).buffers()
    bounds = np.zeros(1, np.int64)
    if len(array):
        bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    raw = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    for values in (raw, bounds):
        values.setflags(write=False)  # always, since a kernel is compiled once more for arrays that can be written
    return Texts(raw, bounds)


def column_of(texts: Texts, name: str = "text") -> pl.Series:
    """The column that holds `texts`, whose data must be valid UTF-8."""
    buffers = [None, pa.py_buffer(texts.offsets), pa.py_buffer(texts.data)]
    array = pa.Array.from_buffers(pa.large_string(), len(texts.offsets) - 1, buffers)
    return pl.Series(name, array, dtype=pl.String)


@kernel
def decode(data: NDArray[np.uint8], at: int) -> tuple[np.int64, int]:
    """The code point at byte `at` and its size in bytes."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | np.int64(data[at + 1]) & 0x3F, 2
    if first < 0xF0:
        return (first & 0x0F) << 12 | (np.int64(data[at + 1]) & 0x3F) << 6 | np.int64(data[at + 2]) & 0x3F, 3
    return (
        (first & 0x07) << 18
        | (np.int64(data[at + 1]) & 0x3F) << 12
        | (np.int64(data[at + 2]) & 0x3F) << 6
        | np.int64(data[at + 3]) & 0x3F,
        4,
    )
