"""C4's rules (Raffel et al., 2020, section 2.2), with the names and limits of datatrove's filter.

Lines that are no prose are taken out; documents with a telltale, or with too few sentences left, are dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from config.quality import C4Config
from data.compiled import kernel
from data.quality.characters import DIGIT, SPACE, character_classes
from data.quality.lines import line_end, stripped
from data.quality.words import sentences
from data.texts import Texts, decode

RULES = ("lorem_ipsum", "curly_bracket", "too_few_sentences", "c4_no_lines_left")
LINE_RULES = ("too_long_word", "no_terminal_punc", "too_few_words", "javascript", "policy")
CITATIONS = (b"[edit]", b"[citation needed]")
PHRASES = (
    b"lorem ipsum",
    b"javascript",
    b"terms of use",
    b"privacy policy",
    b"cookie policy",
    b"uses cookies",
    b"use of cookies",
    b"use cookies",
)
POLICY = 2  # from here on, phrases of policies
OPEN, SHUT, BRACE, NEWLINE, DOT = (ord(character) for character in "[]{\n.")
ENDS = (ord("."), ord("?"), ord("!"), ord('"'), ord("'"))
KEEP = -1
OFF = -1


class Trimmed(NamedTuple):
    """What C4's rules make of texts."""

    verdicts: NDArray[np.int8]
    """(texts,) position in `RULES` of the rule that drops the text, or -1."""
    texts: Texts
    """The texts without the lines that were taken out; whole where the text is dropped."""
    lines: NDArray[np.int64]
    """(texts, 5) lines taken out by each of `LINE_RULES`."""


def c4(texts: Texts, config: C4Config) -> Trimmed:
    """Judge every text and every line."""
    switches = np.array(
        [
            config.remove_citations,
            config.filter_no_terminal_punct,
            config.filter_lorem_ipsum,
            config.filter_javascript,
            config.filter_curly_bracket,
            config.filter_policy,
        ],
        np.bool_,
    )
    values = [config.min_num_sentences, config.min_words_per_line, config.max_word_length]
    limits = np.array([OFF if value is None else value for value in values], np.int64)
    phrases, sizes, starts = _phrase_table()
    verdicts, trimmed, lines = _trim(
        texts.data, texts.offsets, character_classes(), switches, limits, phrases, sizes, starts
    )
    return Trimmed(verdicts, Texts(*trimmed), lines)


def _phrase_table() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """The phrases and citation marks as rows, their sizes, and which bytes a phrase starts with."""
    rows = [*PHRASES, *CITATIONS]
    table = np.zeros((len(rows), max(map(len, rows))), np.uint8)
    starts = np.zeros(256, np.bool_)
    for row, phrase in enumerate(rows):
        table[row, : len(phrase)] = np.frombuffer(phrase, np.uint8)
    for phrase in PHRASES:
        starts[[phrase[0], ord(chr(phrase[0]).upper())]] = True
    return table, np.array([len(row) for row in rows], np.int64), starts


@kernel
def _trim(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint16],
    switches: NDArray[np.bool_],
    limits: NDArray[np.int64],
    phrases: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    starts: NDArray[np.bool_],
) -> tuple[NDArray[np.int8], tuple[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.int64]]:
    verdicts = np.full(len(offsets) - 1, -1, np.int8)
    lines = np.zeros((len(verdicts), 5), np.int64)
    out = np.empty(offsets[-1] - offsets[0], np.uint8)
    bounds = np.zeros(len(offsets), np.int64)
    found = np.zeros(len(phrases), np.bool_)
    size = 0
    for document in range(len(verdicts)):
        begin, end = offsets[document], offsets[document + 1]
        bottom = size
        count = kept = 0
        at = begin
        while at < end:
            stop, after = line_end(data, at, end, classes)
            first, last = stripped(data, at, stop, classes)
            at = after
            start = size + (kept > 0)  # after the newline that joins it to the line before
            words, longest = _words(data, first, last, classes)
            if limits[2] != OFF and longest > limits[2]:
                lines[document, 0] += 1
                continue
            top = _copy(data, first, last, classes, switches[0], phrases, sizes, out, start)
            if switches[1] and not _ends_well(out, start, top):
                lines[document, 1] += 1
                continue
            if words < limits[1]:
                lines[document, 2] += 1
                continue
            brace = _search(out, start, top, phrases, sizes, starts, found)
            policy = False
            for row in range(POLICY, len(PHRASES)):
                policy |= found[row]
            if switches[2] and found[0]:
                verdicts[document] = 0
                break
            if switches[3] and found[1]:
                lines[document, 3] += 1
                continue
            if switches[4] and brace:
                verdicts[document] = 1
                break
            if switches[5] and policy:
                lines[document, 4] += 1
                continue
            if limits[0] != OFF:
                count += sentences(out, start, top, classes)
            if kept:
                out[size] = NEWLINE
            size = top
            kept += 1
        first, last = stripped(out, bottom, size, classes)
        if verdicts[document] == KEEP:
            if count < limits[0]:
                verdicts[document] = 2
            elif first == last:
                verdicts[document] = 3
        if verdicts[document] == KEEP:
            for byte in range(last - first):
                out[bottom + byte] = out[first + byte]
            size = bottom + last - first
        else:
            for byte in range(end - begin):
                out[bottom + byte] = data[begin + byte]
            size = bottom + end - begin
        bounds[document + 1] = size
    return verdicts, (out[:size], bounds), lines


@kernel
def _words(data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]) -> tuple[int, int]:
    """The number of runs without white space, and the characters of the longest."""
    words = longest = length = 0
    at = begin
    while at < end:
        point, size = decode(data, at)
        at += size
        if classes[point] & SPACE:
            length = 0
            continue
        words += length == 0
        length += 1
        longest = max(longest, length)
    return words, longest


@kernel
def _copy(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    classes: NDArray[np.uint16],
    remove_citations: bool,
    phrases: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    out: NDArray[np.uint8],
    top: int,
) -> int:
    """Write the range to `out` at `top`, without citation marks if so asked; returns where it ends."""
    at = begin
    while at < end:
        if remove_citations and data[at] == OPEN:
            stop = at + 1
            while stop < end:
                point, size = decode(data, stop)
                if not classes[point] & DIGIT:
                    break
                stop += size
            if stop < end and data[stop] == SHUT:
                at = stop + 1
                continue
            marked = 0
            for row in range(len(PHRASES), len(sizes)):
                if at + sizes[row] <= end and _equal(data, at, phrases[row], sizes[row], False):
                    marked = sizes[row]
            if marked:
                at += marked
                continue
        out[top] = data[at]
        top += 1
        at += 1
    return top


@kernel
def _equal(data: NDArray[np.uint8], at: int, phrase: NDArray[np.uint8], size: int, fold: bool) -> bool:
    """Whether `phrase` stands at `at`; with `fold`, in capital (ASCII) letters, too."""
    for byte in range(size):
        here = data[at + byte]
        if fold and 65 <= here <= 90:
            here += np.uint8(32)
        if here != phrase[byte]:
            return False
    return True


@kernel
def _ends_well(data: NDArray[np.uint8], begin: int, end: int) -> bool:
    """Whether the line ends with a mark that ends a sentence, and not with an ellipsis."""
    if begin == end:
        return False
    mark = data[end - 1]
    if not (mark == ENDS[0] or mark == ENDS[1] or mark == ENDS[2] or mark == ENDS[3] or mark == ENDS[4]):
        return False
    return not (end - begin >= 3 and data[end - 1] == DOT and data[end - 2] == DOT and data[end - 3] == DOT)


@kernel
def _search(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    phrases: NDArray[np.uint8],
    sizes: NDArray[np.int64],
    starts: NDArray[np.bool_],
    found: NDArray[np.bool_],
) -> bool:
    """Fill `found` with which phrases occur in the range; returns whether a curly bracket does."""
    for row in range(len(PHRASES)):
        found[row] = False
    brace = False
    for at in range(begin, end):
        byte = data[at]
        if byte == BRACE:
            brace = True
        elif starts[byte]:
            for row in range(len(PHRASES)):
                if at + sizes[row] <= end and _equal(data, at, phrases[row], sizes[row], True):
                    found[row] = True
    return brace
