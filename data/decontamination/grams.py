"""A table of the n-grams of evaluation sets, and the search for them in documents."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.files import atomic_write
from data.compiled import kernel
from data.deduplication.words import folding, hash_grams, hash_words
from data.texts import Texts, texts_of


class Grams(NamedTuple):
    """An open-addressing table of 64-bit hashes, at least half of it empty: 32 to 64 bytes for each n-gram."""

    n: int
    keys: NDArray[np.uint64]
    sets: NDArray[np.int64]
    """Bit i is set where set number i holds the n-gram; 0 marks an empty entry."""

    def save(self, path: Path) -> None:
        """Write the table, atomically."""
        with atomic_write(path) as file:
            np.savez(file, n=self.n, keys=self.keys, sets=self.sets)


def load_grams(path: Path) -> Grams:
    """What `Grams.save` wrote."""
    with path.open("rb") as file, np.load(file) as content:
        return Grams(int(content["n"]), content["keys"], content["sets"])


def make_grams(hashes: NDArray[np.uint64], sets: NDArray[np.int64], n: int) -> Grams:
    """The table of n-grams with these hashes, each of the set whose bit stands beside it."""
    size = 1 << max(4, int(2 * len(hashes) - 1).bit_length())
    table = Grams(n, np.zeros(size, np.uint64), np.zeros(size, np.int64))
    _insert(table.keys, table.sets, hashes, sets)
    return table


def grams_of(texts: list[str], n: int) -> tuple[NDArray[np.uint64], int]:
    """The hashes of all runs of `n` words, and how many texts have fewer words than that."""
    column = texts_of(pl.Series("text", texts, dtype=pl.String))
    return _grams(*column, column.longest, folding(digits_alike=False), n)


def find_grams(texts: Texts, grams: Grams) -> NDArray[np.int64]:
    """What is found: text, first byte, end byte in that text and sets of each n-gram, shape (found, 4), in order."""
    return _find(*texts, texts.longest, folding(digits_alike=False), grams.n, grams.keys, grams.sets)


@kernel
def _place(keys: NDArray[np.uint64], sets: NDArray[np.int64], key: np.uint64) -> np.int64:
    """Where `key` stands, or the empty entry where it belongs."""
    last = np.uint64(len(keys) - 1)
    at = key & last
    while sets[at] and keys[at] != key:
        at = (at + np.uint64(1)) & last
    return np.int64(at)


@kernel
def _insert(
    keys: NDArray[np.uint64], sets: NDArray[np.int64], hashes: NDArray[np.uint64], bits: NDArray[np.int64]
) -> None:
    for number in range(len(hashes)):
        at = _place(keys, sets, hashes[number])
        keys[at] = hashes[number]
        sets[at] |= bits[number]


@kernel
def _grams(
    data: NDArray[np.uint8], offsets: NDArray[np.int64], room: int, table: NDArray[np.uint32], n: int
) -> tuple[NDArray[np.uint64], int]:
    words = np.empty(room, np.uint64)
    starts, ends = np.empty(room, np.int64), np.empty(room, np.int64)
    result = np.empty(offsets[-1] - offsets[0], np.uint64)
    total = short = 0
    for text in range(len(offsets) - 1):
        count = hash_words(data, offsets[text], offsets[text + 1], table, words, starts, ends)
        if count < n:
            short += 1
            continue
        grams = hash_grams(words, count, n)
        result[total : total + grams] = words[:grams]
        total += grams
    return result[:total].copy(), short


@kernel
def _find(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    room: int,
    table: NDArray[np.uint32],
    n: int,
    keys: NDArray[np.uint64],
    sets: NDArray[np.int64],
) -> NDArray[np.int64]:
    words = np.empty(room, np.uint64)
    starts, ends = np.empty(room, np.int64), np.empty(room, np.int64)
    found = np.empty((16, 4), np.int64)
    total = 0
    for text in range(len(offsets) - 1):
        begin = offsets[text]
        count = hash_words(data, begin, offsets[text + 1], table, words, starts, ends)
        if count < n:
            continue
        for gram in range(hash_grams(words, count, n)):
            bits = sets[_place(keys, sets, words[gram])]
            if not bits:
                continue
            if total == len(found):
                longer = np.empty((2 * total, 4), np.int64)
                longer[:total] = found
                found = longer
            found[total, 0] = text
            found[total, 1] = starts[gram] - begin
            found[total, 2] = ends[gram + n - 1] - begin
            found[total, 3] = bits
            total += 1
    return found[:total].copy()
