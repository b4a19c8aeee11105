"""Words and sentences, as all rules count them.

A word is a run of letters, digits, underscores and combining marks; an apostrophe or a full stop between two of these
joins them (`don't`, `example.com`), and so does a comma between two digits (`1,000`). Any other character that is not
white space is a word by itself, except that a run of one and the same (`...`, `----`) is one word. This follows
Unicode's default word boundaries (UAX 29) and needs no model and no language.

A sentence ends with one or more of `. ! ? ...`, then any closing quotation marks and brackets, then white space or the
end of the line; with the marks of other scripts, such as the ideographic full stop, it ends whatever follows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel
from data.quality.characters import (
    APOSTROPHE,
    CLOSER,
    COMMA,
    DIGIT,
    ENDER,
    FULL_ENDER,
    POINT,
    SPACE,
    WORD,
    character_classes,
)
from data.texts import decode


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    data = np.frombuffer(text.encode(), np.uint8)
    starts, ends, lengths = (np.empty(len(data), np.int64) for _ in range(3))
    kinds = np.empty(len(data), np.uint16)
    count = find_words(data, 0, len(data), character_classes(), starts, ends, lengths, kinds)
    raw = data.tobytes()
    return [raw[start:end].decode() for start, end in zip(starts[:count].tolist(), ends[:count].tolist())]


def count_sentences(text: str) -> int:
    """The number of sentences of a line."""
    data = np.frombuffer(text.encode(), np.uint8)
    return int(sentences(data, 0, len(data), character_classes()))


@kernel
def next_word(
    data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]
) -> tuple[int, int, int, np.int64]:
    """The first word at or after `begin`: start, end, characters, and the bits that any of its characters has.

    Its start is `end` where there is none.
    """
    at = begin
    kind = point = np.int64(0)
    size = 0
    while at < end:
        point, size = decode(data, at)
        kind = np.int64(classes[point])
        if not kind & SPACE:
            break
        at += size
    if at >= end:
        return end, end, 0, kind
    start, length, bits, first = at, 1, kind, point
    at += size
    if not kind & WORD:
        while at < end:
            point, size = decode(data, at)
            if point != first:
                break
            at += size
            length += 1
        return start, at, length, bits
    while at < end:
        point, size = decode(data, at)
        here = np.int64(classes[point])
        if not here & WORD:
            if not here & (APOSTROPHE | POINT | COMMA) or at + size >= end:
                break
            after, _ = decode(data, at + size)
            wanted = DIGIT if here & COMMA else WORD
            if not (kind & wanted and np.int64(classes[after]) & wanted):
                break
        kind = here
        bits |= here
        at += size
        length += 1
    return start, at, length, bits


@kernel
def find_words(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    classes: NDArray[np.uint16],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    lengths: NDArray[np.int64],
    bits: NDArray[np.uint16],
) -> int:
    """Fill the arrays, which hold one entry per byte at most, with the words of the range; returns their number."""
    count = 0
    at = begin
    while True:
        start, at, length, kind = next_word(data, at, end, classes)
        if start == end:
            return count
        starts[count] = start
        ends[count] = at
        lengths[count] = length
        bits[count] = kind
        count += 1


@kernel
def count_words(data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]) -> int:
    """The number of words of the range."""
    count = 0
    at = begin
    while True:
        start, at, _, _ = next_word(data, at, end, classes)
        if start == end:
            return count
        count += 1


@kernel
def sentences(data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]) -> int:
    """The number of sentences of the range; what follows the last end of a sentence is one, too."""
    count = 0
    at = begin
    pending = False  # something stands after the last end
    while at < end:
        point, size = decode(data, at)
        kind = np.int64(classes[point])
        at += size
        if kind & SPACE:
            continue
        pending = True
        if not kind & (ENDER | FULL_ENDER):
            continue
        full = kind & FULL_ENDER
        while at < end:
            point, size = decode(data, at)
            kind = np.int64(classes[point])
            if not kind & (ENDER | FULL_ENDER | CLOSER):
                break
            full |= kind & FULL_ENDER
            at += size
        if full or at >= end or kind & SPACE:
            count += 1
            pending = False
    return count + pending
