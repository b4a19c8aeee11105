"""Gopher's repetition rules (Rae et al., 2021, table A1), with the names and limits of datatrove's filter."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from config.quality import GopherRepetitionConfig
from data.compiled import kernel
from data.quality.characters import character_classes
from data.quality.lines import characters, stripped
from data.quality.repeats import (
    BACK,
    FIRST,
    STEP,
    Seen,
    byte_values,
    new_seen,
    range_hash,
    see,
    slot,
    table_size,
)
from data.quality.words import count_words, next_word
from data.texts import Texts

TOP = (2, 3, 4)
DUPLICATED = (5, 6, 7, 8, 9, 10)
RULES = (
    "empty",
    "dup_para_frac",
    "dup_para_char_frac",
    "dup_line_frac",
    "dup_line_char_frac",
    *(f"top_{n}_gram" for n in TOP),
    *(f"duplicated_{n}_n_grams" for n in DUPLICATED),
)
NEWLINE = ord("\n")
OFF = -1.0
SMALL = 1 << 16  # bytes of a text up to which room is made for the most words it could have
BOUNDARY = (np.uint64(0xA24BAED4963EE407), np.uint64(0x9FB21C651E98DF25), np.uint64(0xC13FA9A902A6328F))


def gopher_repetition(texts: Texts, config: GopherRepetitionConfig) -> NDArray[np.int8]:
    """For each text the position in `RULES` of the first rule that drops it, or -1."""
    values = [getattr(config, name) for name in RULES[1:]]
    limits = np.array([OFF, *(OFF if value is None else value for value in values)], np.float64)
    limits[1:5][limits[1:5] == 0] = OFF  # as datatrove takes it
    return _judge(texts.data, texts.offsets, character_classes(), byte_values(), limits)


class Words(NamedTuple):
    """The words of one text, n of them, as sums up to each: differences give the hash and length of any run."""

    hashes: NDArray[np.uint64]  # (n + 1,) sum of byte values times rising powers of the base
    inverses: NDArray[np.uint64]  # (n + 1,) the inverse of the power at which the next word starts
    letters: NDArray[np.int32]  # (n + 1,) characters
    bytes: NDArray[np.int32]  # (n + 1,)


@kernel
def _room(words: int) -> Words:
    """For so many words."""
    return Words(
        np.zeros(words + 1, np.uint64),
        np.zeros(words + 1, np.uint64),
        np.zeros(words + 1, np.int32),
        np.zeros(words + 1, np.int32),
    )


@kernel
def _judge(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint16],
    values: NDArray[np.uint64],
    limits: NDArray[np.float64],
) -> NDArray[np.int8]:
    verdicts = np.full(len(offsets) - 1, -1, np.int8)
    words = _room(SMALL)
    seen = new_seen(1 << 10)
    for document in range(len(verdicts)):
        begin, end = offsets[document], offsets[document + 1]
        length = characters(data, begin, end)
        if not length:
            verdicts[document] = 0
            continue
        newlines = 0
        for at in range(begin, end):
            newlines += data[at] == NEWLINE
        size = table_size(newlines + 2)
        if size > len(seen.keys):
            seen = new_seen(size)
        verdict = _parts(data, begin, end, classes, values, limits, length, size, seen)
        if verdict < 0:
            room = end - begin if end - begin <= SMALL else count_words(data, begin, end, classes)
            if room >= len(words.hashes):
                words = _room(room)
            count = _find(data, begin, end, classes, values, words)
            size = table_size(count)
            if size > len(seen.keys):
                seen = new_seen(size)
            verdict = _grams(words, count, limits, length, size, seen)
        verdicts[document] = verdict
    return verdicts


@kernel
def _parts(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    classes: NDArray[np.uint16],
    values: NDArray[np.uint64],
    limits: NDArray[np.float64],
    length: int,
    size: int,
    seen: Seen,
) -> int:
    """The first rule about paragraphs or lines that drops the text, or -1."""
    first, last = stripped(data, begin, end, classes)
    parts, repeated, letters = _repeated(data, first, last, 2, values, size, seen)
    if limits[1] >= 0 and repeated / parts > limits[1]:
        return 1
    if limits[2] >= 0 and letters / length > limits[2]:
        return 2
    parts, repeated, letters = _repeated(data, begin, end, 1, values, size, seen)
    if limits[3] >= 0 and repeated / parts > limits[3]:
        return 3
    if limits[4] >= 0 and letters / length > limits[4]:
        return 4
    return -1


@kernel
def _repeated(
    data: NDArray[np.uint8], begin: int, end: int, newlines: int, values: NDArray[np.uint64], size: int, seen: Seen
) -> tuple[int, int, int]:
    """Parts between runs of at least so many newlines; how many equal an earlier one; characters of these."""
    parts = repeated = letters = 0
    seen.stamp[0] += 1
    at = begin
    while True:
        stop = at
        after = end + 1
        while stop < end:
            if data[stop] == NEWLINE:
                after = stop + 1
                while after < end and data[after] == NEWLINE:
                    after += 1
                if after - stop >= newlines:
                    break
                stop = after
                after = end + 1
            else:
                stop += 1
        parts += 1
        if see(seen, range_hash(data, at, stop, values), size):
            repeated += 1
            letters += characters(data, at, stop)
        if after > end:
            return parts, repeated, letters
        at = after


@kernel
def _find(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    classes: NDArray[np.uint16],
    values: NDArray[np.uint64],
    words: Words,
) -> int:
    """Fill `words`; returns their number."""
    count = 0
    total = np.uint64(0)
    power = inverse = FIRST
    words.inverses[0] = inverse
    at = begin
    while True:
        start, at, length, _ = next_word(data, at, end, classes)
        if start == end:
            return count
        for byte in range(start, at):
            total += values[data[byte]] * power
            power *= STEP
            inverse *= BACK
        words.letters[count + 1] = words.letters[count] + length
        words.bytes[count + 1] = words.bytes[count] + (at - start)
        count += 1
        words.hashes[count] = total
        words.inverses[count] = inverse


@kernel
def _grams(words: Words, count: int, limits: NDArray[np.float64], length: int, size: int, seen: Seen) -> int:
    """The first rule about n-grams of words that drops the text, or -1."""
    for rule, n in ((5, 2), (6, 3), (7, 4)):
        if limits[rule] >= 0 and count >= n and _top(words, count, n, size, seen) / length > limits[rule]:
            return rule
    for rule in range(8, 14):
        if limits[rule] >= 0 and _duplicated(words, count, rule - 3, size, seen) / length > limits[rule]:
            return rule
    return -1


@kernel
def _top(words: Words, count: int, n: int, size: int, seen: Seen) -> int:
    """Characters, spaces between words included, of the most frequent n-gram times its number; the first of equals."""
    seen.stamp[0] += 1
    most, best = 0, 0
    for word in range(count - n + 1):
        key = (words.hashes[word + n] - words.hashes[word]) * words.inverses[word]
        for border in range(1, n):
            key += np.uint64(words.bytes[word + border] - words.bytes[word]) * BOUNDARY[border - 1]
        at = slot(seen, key, size)
        if seen.stamps[at] != seen.stamp[0]:
            seen.keys[at] = key
            seen.stamps[at] = seen.stamp[0]
            seen.counts[at] = 0
            seen.firsts[at] = word
        seen.counts[at] += 1
        if seen.counts[at] > most or seen.counts[at] == most and seen.firsts[at] < best:
            most, best = seen.counts[at], seen.firsts[at]
    return int(most * (words.letters[best + n] - words.letters[best] + n - 1))


@kernel
def _duplicated(words: Words, count: int, n: int, size: int, seen: Seen) -> int:
    """Characters of the n-grams that occurred before, read from left to right without overlap of repeated ones."""
    seen.stamp[0] += 1
    letters = 0
    word = 0
    while word < count - n + 1:
        if see(seen, (words.hashes[word + n] - words.hashes[word]) * words.inverses[word], size):
            letters += words.letters[word + n] - words.letters[word]
            word += n
        else:
            word += 1
    return letters
