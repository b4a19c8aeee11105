"""Cutting text into the words that BPE merges within, and counting them: the patterns of GPT-2 and Llama 3 by hand.

Both patterns are regular expressions of the same few parts, and a kernel that knows them reads text many times as fast
as a regular expression does. What is a letter, a number or white space is asked of the reference library, so that a
word is the same here as in the encoders.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel
from data.texts import decode

OTHER, LETTER, NUMBER, SPACE, BREAK = 0, 1, 2, 3, 4  # BREAK is white space that is a line feed or a carriage return
LONGEST_WORD = 10_000  # characters; what lies past them in a word teaches nothing and would cost much
LONGEST_BYTES = 4 * LONGEST_WORD
CODE_POINTS = 0x110000
ASSIGNED = 0x40000  # beyond are marks, formats and private use
SURROGATES = range(0xD800, 0xE000)
START = 1 << 12  # words and slots that the table begins with

Number = TypeVar("Number", bound=np.generic)


class Words(NamedTuple):
    """Different words: `data[ends[i - 1]:ends[i]]` is word number i as UTF-8, which occurred `counts[i]` times."""

    data: NDArray[np.uint8]
    ends: NDArray[np.int64]
    counts: NDArray[np.int64]


def count_words(texts: Iterable[str], pattern: str) -> Words:
    """The different words of all `texts` by `pattern` (gpt2 or llama3), in the order in which they first occur.

    Memory grows with the different words, not with the text. Of a word longer than 10,000 characters, only these count.
    """
    classes, llama = character_classes(), pattern == "llama3"
    slots = np.full(4 * START, -1, np.int32)
    hashes, ends, counts = np.empty(START, np.uint64), np.empty(START, np.int64), np.empty(START, np.int64)
    arena = np.empty(16 * START + LONGEST_BYTES, np.uint8)
    words = 0
    for text in texts:
        data = np.frombuffer(text.encode(), np.uint8)
        at = 0
        while at < len(data):
            at, words = _count(data, at, classes, llama, slots, hashes, ends, counts, arena, words)
            if words == len(counts):
                hashes, ends, counts = _doubled(hashes), _doubled(ends), _doubled(counts)
                slots = _slots(hashes[:words], 4 * len(hashes))
            if words and len(arena) - ends[words - 1] < LONGEST_BYTES:
                arena = _doubled(arena)
    size = int(ends[words - 1]) if words else 0
    return Words(arena[:size], ends[:words], counts[:words])


def split_words(text: str, pattern: str) -> list[str]:
    """The words of one text by `pattern`, in order; together they are the text."""
    data = np.frombuffer(text.encode(), np.uint8)
    words, at = [], 0
    while at < len(data):
        end = next_word(data, at, character_classes(), pattern == "llama3")
        words.append(data[at:end].tobytes().decode())
        at = end
    return words


@lru_cache(maxsize=1)
def character_classes() -> NDArray[np.uint8]:
    """LETTER, NUMBER, SPACE, BREAK or OTHER for every code point, (0x110000,) uint8, as `tokenizers` has it."""
    from tokenizers import Regex, normalizers

    classes = np.zeros(CODE_POINTS, np.uint8)
    points = np.array([point for point in range(ASSIGNED) if point not in SURROGATES])
    everything = "".join(map(chr, points))
    for number, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s"), (BREAK, r"[\r\n]")):
        replaced = normalizers.Replace(Regex(pattern), "\0").normalize_str(everything)
        classes[points[np.frombuffer(replaced.encode("utf-32-le"), np.uint32) == 0]] = number
    classes[0] = OTHER
    classes.setflags(write=False)
    return classes


def _doubled(values: NDArray[Number]) -> NDArray[Number]:
    """The same values, with room for as many more."""
    return np.concatenate([values, np.empty_like(values)])


def _slots(hashes: NDArray[np.uint64], size: int) -> NDArray[np.int32]:
    """A hash table of `size` slots, a power of two, that holds the numbers of all words."""
    slots = np.full(size, -1, np.int32)
    _fill(slots, hashes)
    return slots


@kernel
def _fill(slots: NDArray[np.int32], hashes: NDArray[np.uint64]) -> None:
    mask = np.uint64(len(slots) - 1)
    for word in range(len(hashes)):
        slot = hashes[word] & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = word


@kernel
def _count(
    data: NDArray[np.uint8],
    at: int,
    classes: NDArray[np.uint8],
    llama: bool,
    slots: NDArray[np.int32],
    hashes: NDArray[np.uint64],
    ends: NDArray[np.int64],
    counts: NDArray[np.int64],
    arena: NDArray[np.uint8],
    words: int,
) -> tuple[int, int]:
    """Count the words of `data` from byte `at` on; where it stopped, for want of room or text, and words by then."""
    mask = np.uint64(len(slots) - 1)
    while at < len(data):
        used = ends[words - 1] if words else 0
        if words == len(counts) or len(arena) - used < LONGEST_BYTES:
            return at, words
        start, at = at, next_word(data, at, classes, llama)
        end = shortened(data, start, at)
        value = np.uint64(14695981039346656037)  # FNV-1a
        for position in range(start, end):
            value = (value ^ np.uint64(data[position])) * np.uint64(1099511628211)
        value ^= value >> np.uint64(32)
        slot = value & mask
        while True:
            word = slots[slot]
            if word < 0:
                for position in range(start, end):
                    arena[used + position - start] = data[position]
                slots[slot], hashes[words], ends[words], counts[words] = words, value, used + end - start, 1
                words += 1
                break
            begin = ends[word - 1] if word else 0
            same = hashes[word] == value and ends[word] - begin == end - start
            position = start
            while same and position < end:
                same = data[position] == arena[begin + position - start]
                position += 1
            if same:
                counts[word] += 1
                break
            slot = (slot + np.uint64(1)) & mask
    return at, words


@kernel
def shortened(data: NDArray[np.uint8], start: int, end: int) -> int:
    """`end`, or where the first `LONGEST_WORD` characters from `start` end."""
    if end - start <= LONGEST_WORD:
        return end
    characters, at = 0, start
    while at < end and characters < LONGEST_WORD:
        at += decode(data, at)[1]
        characters += 1
    return at


@kernel
def next_word(data: NDArray[np.uint8], at: int, classes: NDArray[np.uint8], llama: bool) -> int:
    """Where the word that starts at byte `at` ends."""
    point, size = decode(data, at)
    kind = classes[point]
    if point == 39:  # an apostrophe
        end = contraction(data, at + 1, llama)
        if end > at + 1:
            return end
    after = at + size
    following, width = (decode(data, after)) if after < len(data) else (np.int64(0), 0)
    next_kind = classes[following] if width else SPACE
    if llama and kind != LETTER and kind != NUMBER and kind != BREAK and next_kind == LETTER and width:
        return run_end(data, after, classes, LETTER, len(data))
    if llama and kind == NUMBER:
        return run_end(data, at, classes, NUMBER, 3)
    if point == 32 and width and next_kind < SPACE and not (llama and next_kind == NUMBER):
        at, kind = after, next_kind
    if kind < SPACE:
        end = run_end(data, at, classes, kind, len(data))
        return run_end(data, end, classes, BREAK, len(data)) if llama and kind == OTHER else end
    return blank_end(data, at, classes, llama)


@kernel
def run_end(data: NDArray[np.uint8], at: int, classes: NDArray[np.uint8], kind: int, most: int) -> int:
    """Where the run of at most `most` characters of one class that starts at `at` ends."""
    while at < len(data) and most:
        point, size = decode(data, at)
        if classes[point] != kind:
            break
        at += size
        most -= 1
    return at


@kernel
def blank_end(data: NDArray[np.uint8], at: int, classes: NDArray[np.uint8], llama: bool) -> int:
    """Where a word of white space that starts at `at` ends: before the last one, which belongs to the next word."""
    start = last = at
    after_break = at
    while at < len(data):
        point, size = decode(data, at)
        if classes[point] < SPACE:
            break
        last = at
        at += size
        if classes[point] == BREAK:
            after_break = at
    if llama and after_break > start:
        return after_break
    return at if at == len(data) or last == start else last


@kernel
def contraction(data: NDArray[np.uint8], at: int, llama: bool) -> int:
    """Where an English contraction ('s 't 're 've 'm 'll 'd) ends whose apostrophe is before `at`, or `at`."""
    if at >= len(data):
        return at
    first = np.int64(data[at])
    if llama and first == 0xC5 and data[at + 1] == 0xBF:  # the long s, in whatever case
        return at + 2
    second = np.int64(data[at + 1]) if at + 1 < len(data) else np.int64(0)
    if llama:
        first = first | 32 if 65 <= first <= 90 else first
        second = second | 32 if 65 <= second <= 90 else second
    if first == 115 or first == 116 or first == 109 or first == 100:  # s t m d
        return at + 1
    if (first == 114 or first == 118) and second == 101 or first == 108 and second == 108:  # re ve ll
        return at + 2
    return at
