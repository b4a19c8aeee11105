"""A keyed permutation of 0 ... length-1 that needs no memory: the order of the training data.

A Feistel network scrambles the smallest power of two that holds `length`; an index that falls outside is scrambled
again until it falls inside ("cycle walking", Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, 2002). Every
step of that is invertible, so the whole is a bijection for any length, and sample k of an epoch can be asked for
directly.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4  # of two half-rounds each
MIN_BITS = 6  # a smaller domain has too few keyed orders

UInt64Array = NDArray[np.uint64]


@overload
def permute(index: int, length: int, seed: int, epoch: int) -> int: ...


@overload
def permute(index: NDArray[Any], length: int, seed: int, epoch: int) -> NDArray[np.int64]: ...


def permute(index: int | NDArray[Any], length: int, seed: int, epoch: int) -> int | NDArray[np.int64]:
    """Where sample `index` of `epoch` lies among `length` samples, for one index or an integer array of any shape.

    For a fixed (`length`, `seed`, `epoch`) it is a bijection of 0 ... length-1. Raises `IndexError` outside that range.
    """
    if isinstance(index, np.ndarray):
        values = index.astype(np.int64)
        if values.size and (values.min() < 0 or values.max() >= length):
            raise IndexError(f"index outside 0 ... {length - 1}")
        return _walk(values.astype(np.uint64), length, _keys(seed, epoch)).astype(np.int64)
    return int(permute(np.array([index]), length, seed, epoch)[0])


def _walk(values: UInt64Array, length: int, keys: UInt64Array) -> UInt64Array:
    bits = max(MIN_BITS, (length - 1).bit_length())
    values = _scramble(values, bits, keys)
    outside = values >= length
    while outside.any():
        values[outside] = _scramble(values[outside], bits, keys)
        outside = values >= length
    return values


def _scramble(values: UInt64Array, bits: int, keys: UInt64Array) -> UInt64Array:
    """A keyed bijection of 0 ... 2**bits-1: each half in turn is XORed with a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for low_key, high_key in keys.reshape(ROUNDS, 2):
        low = low ^ (_mix(high ^ low_key) & low_mask)
        high = high ^ (_mix(low ^ high_key) & high_mask)
    return (high << low_bits) | low


def _mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of input moves every bit of output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _keys(seed: int, epoch: int) -> UInt64Array:
    """Round keys, shape (2 * ROUNDS,), by SplitMix64 from a hash of seed and epoch."""
    gamma = 0x9E3779B97F4A7C15
    start = _mix(np.array([(seed * gamma + 1) % 2**64], dtype=np.uint64)) ^ np.uint64(epoch)
    steps = np.arange(1, 2 * ROUNDS + 1, dtype=np.uint64) * np.uint64(gamma)
    return _mix(_mix(start) + steps)
