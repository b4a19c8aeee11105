"""Lines and their ends, as all rules see them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel
from data.quality.characters import BREAK, SPACE
from data.texts import decode


@kernel
def stripped(data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]) -> tuple[int, int]:
    """The range without white space at its ends, as `str.strip`."""
    while begin < end:
        point, size = decode(data, begin)
        if not classes[point] & SPACE:
            break
        begin += size
    while begin < end:
        last = end - 1
        while data[last] & 0xC0 == 0x80:
            last -= 1
        point, _ = decode(data, last)
        if not classes[point] & SPACE:
            break
        end = last
    return begin, end


@kernel
def line_end(data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]) -> tuple[int, int]:
    """Where the line that starts at `begin` ends, and where the next one starts, as `str.splitlines`."""
    at = begin
    while at < end:
        point, size = decode(data, at)
        if classes[point] & BREAK:
            if point == 13 and at + 1 < end and data[at + 1] == 10:
                return at, at + 2
            return at, at + size
        at += size
    return end, end


@kernel
def characters(data: NDArray[np.uint8], begin: int, end: int) -> int:
    """Number of code points of the range."""
    count = 0
    for at in range(begin, end):
        count += data[at] & 0xC0 != 0x80
    return count
