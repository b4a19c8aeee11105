"""Words as deduplication and decontamination compare them: without case, accents, punctuation and white space.

A word is a run of letters, digits and marks. In scripts that put no space between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese) every character is a word. Letters count as their lower-case base letter, so `Café` is `cafe`; for
near-duplicates all digits count as 0, so pages that differ in a date or a number are alike (datatrove does the same).
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel
from data.texts import decode

CODE_POINTS = 0x110000
BORDER = 0  # ends a word
SILENT = 1  # counts as nothing, within a word
ALONE = np.uint32(1 << 31)  # is a word by itself
ALPHABETIC = (range(0x3400), range(0xA000, 0xAC00), range(0xF900, 0x20000))
HANGUL = range(0xAC00, 0xD7A4)
ACCENTS = (range(0x300, 0x370), range(0x1AB0, 0x1B00), range(0x1DC0, 0x1E00), range(0x20D0, 0x2100))
UNSPACED = (
    range(0x0E01, 0x0F00),  # Thai, Lao
    range(0x1000, 0x10A0),  # Burmese
    range(0x1780, 0x1800),  # Khmer
    range(0x3005, 0x3008),
    range(0x3041, 0x3100),  # Japanese syllables
    range(0x31F0, 0x3200),
    range(0x3400, 0x4DC0),  # Chinese characters, here and below
    range(0x4E00, 0xA000),
    range(0xF900, 0xFB00),
    range(0xFF66, 0xFF9E),
    range(0x20000, 0x33480),
)

MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
STEP = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=2)
def folding(digits_alike: bool) -> NDArray[np.uint32]:
    """What every code point counts as, (0x110000,) uint32: `BORDER`, `SILENT`, or a code point, `ALONE` or not."""
    table = np.zeros(CODE_POINTS, np.uint32)
    table[HANGUL.start : HANGUL.stop] = HANGUL
    for points in ALPHABETIC:
        for point in points:
            table[point] = _fold(chr(point), digits_alike)
    for points in UNSPACED:
        block = table[points.start : points.stop]
        if points.start >= 0x3400:  # all of these are letters
            block[:] = points
        block[block > SILENT] |= ALONE
    table.setflags(write=False)
    return table


def _fold(character: str, digits_alike: bool) -> int:
    if character.isdecimal():
        return ord("0" if digits_alike else str(unicodedata.decimal(character)))
    if not character.isalnum():
        if unicodedata.category(character)[0] != "M":
            return BORDER
        return SILENT if any(ord(character) in accents for accents in ACCENTS) else ord(character)
    letter, *marks = list(unicodedata.normalize("NFKD", character.lower()))
    return ord(letter) if letter.isalnum() and all(map(unicodedata.combining, marks)) else ord(character)


@kernel
def mix(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of input moves every bit of output."""
    value = (value ^ (value >> np.uint64(30))) * MIX_1
    value = (value ^ (value >> np.uint64(27))) * MIX_2
    return value ^ (value >> np.uint64(31))


@kernel
def hash_words(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    table: NDArray[np.uint32],
    hashes: NDArray[np.uint64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> int:
    """Fill the arrays, one entry per byte at most, with the hash and the bytes of each word; returns their number."""
    count = 0
    at = begin
    inside = False
    value = np.uint64(0)
    while at < end:
        point, size = decode(data, at)
        folded = table[point]
        if folded == BORDER or folded & ALONE:
            if inside:
                hashes[count] = mix(value)
                ends[count] = at
                count += 1
                inside = False
            if folded & ALONE:
                hashes[count] = mix(np.uint64(folded))
                starts[count] = at
                ends[count] = at + size
                count += 1
        elif folded != SILENT:
            if not inside:
                inside = True
                value = STEP
                starts[count] = at
            value = (value ^ np.uint64(folded)) * MIX_2
            value ^= value >> np.uint64(29)
        at += size
    if inside:
        hashes[count] = mix(value)
        ends[count] = end
        count += 1
    return count


@kernel
def hash_grams(words: NDArray[np.uint64], count: int, n: int) -> int:
    """Replace `words[:count]` by the hashes of its runs of `n` words, or of all where there are fewer.

    Returns the number of runs: none without words.
    """
    if count == 0:
        return 0
    n = min(n, count)
    power = np.uint64(1)
    for _ in range(n):
        power *= STEP
    rolling = np.uint64(0)
    for at in range(n):
        rolling = rolling * STEP + words[at]
    for at in range(count - n):
        first = words[at]
        words[at] = mix(rolling)
        rolling = rolling * STEP + words[at + n] - first * power
    words[count - n] = mix(rolling)
    return count - n + 1
