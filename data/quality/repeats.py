"""Finding what occurs again: hashes of ranges of bytes, and a table of those seen that is never cleared.

The hash of a range is the polynomial of its bytes, each mapped to 64 random bits, at an odd base modulo 2^64. Since the
base has an inverse, the hash of any run of words follows from two prefix sums, at no cost per byte.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel

MASK = (1 << 64) - 1
BASE = 0x9E3779B97F4A7C15 | 1
INVERSE = pow(BASE, -1, 1 << 64)
MIX = np.uint64(0xD6E8FEB86659FD93)
FIRST = np.uint64(1)
STEP = np.uint64(BASE)
BACK = np.uint64(INVERSE)


class Seen(NamedTuple):
    """An open-addressing table. An entry counts only if its stamp is the current one, so a new stamp empties it."""

    keys: NDArray[np.uint64]
    stamps: NDArray[np.int32]
    counts: NDArray[np.int32]
    firsts: NDArray[np.int32]
    stamp: NDArray[np.int32]  # (1,)


@kernel
def table_size(entries: int) -> int:
    """Places for so many keys, at least half of them free: a power of two."""
    size = 16
    while size < 2 * entries:
        size *= 2
    return size


@kernel
def new_seen(size: int) -> Seen:
    """An empty table."""
    return Seen(
        np.empty(size, np.uint64),
        np.zeros(size, np.int32),
        np.zeros(size, np.int32),
        np.zeros(size, np.int32),
        np.zeros(1, np.int32),
    )


@lru_cache(maxsize=1)
def byte_values() -> NDArray[np.uint64]:
    """64 random bits for each byte, always the same."""
    return np.random.default_rng(0).integers(1, MASK, 256, np.uint64)


@kernel
def range_hash(data: NDArray[np.uint8], begin: int, end: int, values: NDArray[np.uint64]) -> np.uint64:
    """The hash of a range of bytes."""
    result = np.uint64(0)
    for at in range(begin, end):
        result = result * STEP + values[data[at]]
    return result


@kernel
def slot(seen: Seen, key: np.uint64, size: int) -> np.int64:
    """Where `key` stands, or the free entry where it belongs, in the first `size` entries (a power of two)."""
    mask = size - 1
    mixed = key * MIX
    at = np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))
    while seen.stamps[at] == seen.stamp[0] and seen.keys[at] != key:
        at = (at + 1) & mask
    return at


@kernel
def see(seen: Seen, key: np.uint64, size: int) -> bool:
    """Whether `key` was seen since the last new stamp; from now on it is."""
    at = slot(seen, key, size)
    if seen.stamps[at] == seen.stamp[0]:
        return True
    seen.keys[at] = key
    seen.stamps[at] = seen.stamp[0]
    return False
