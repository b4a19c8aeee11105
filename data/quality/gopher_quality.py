"""Gopher's quality rules (Rae et al., 2021, appendix A.1.1), with the names and limits of datatrove's filter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from config.quality import GopherQualityConfig
from data.compiled import kernel
from data.quality.characters import ALPHA, SPACE, TEXT, character_classes
from data.quality.lines import line_end
from data.quality.words import next_word
from data.texts import Texts, decode

RULES = (
    "gopher_short_doc",
    "gopher_long_doc",
    "gopher_below_avg_threshold",
    "gopher_above_avg_threshold",
    "gopher_too_many_hashes",
    "gopher_too_many_ellipsis",
    "gopher_too_many_bullets",
    "gopher_too_many_end_ellipsis",
    "gopher_below_alpha_threshold",
    "gopher_enough_stop_words",
)
BULLETS = (ord("-"), ord("\u2022"))
HASH, DOT, ELLIPSIS = ord("#"), ord("."), ord("\u2026")
OFF = -1.0  # a limit that is switched off; datatrove takes zero for that as well


def gopher_quality(texts: Texts, config: GopherQualityConfig) -> NDArray[np.int8]:
    """For each text the position in `RULES` of the first rule that drops it, or -1."""
    limits: list[float | None] = [
        config.min_doc_words,
        config.max_doc_words,
        config.min_avg_word_length,
        config.max_avg_word_length,
        config.max_symbol_word_ratio,
        config.max_symbol_word_ratio,
        config.max_bullet_lines_ratio,
        config.max_ellipsis_lines_ratio,
        config.max_non_alpha_words_ratio,
        config.min_stop_words,
    ]
    stop_words = sorted({word.encode() for word in config.stop_words})
    longest = max(map(len, stop_words), default=1)
    words = np.zeros((len(stop_words), longest), np.uint8)
    for row, word in enumerate(stop_words):
        words[row, : len(word)] = np.frombuffer(word, np.uint8)
    sizes = np.array([len(word) for word in stop_words], np.int64)
    return _judge(texts.data, texts.offsets, character_classes(), _limits(limits), words, sizes)


def _limits(limits: list[float | None]) -> NDArray[np.float64]:
    return np.array([limit or OFF for limit in limits], np.float64)


@kernel
def _judge(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint16],
    limits: NDArray[np.float64],
    stop_words: NDArray[np.uint8],
    stop_sizes: NDArray[np.int64],
) -> NDArray[np.int8]:
    verdicts = np.full(len(offsets) - 1, -1, np.int8)
    counts = np.zeros(10, np.float64)
    for document in range(len(verdicts)):
        begin, end = offsets[document], offsets[document + 1]
        _measure(data, begin, end, classes, stop_words, stop_sizes, counts)
        for rule in range(10):
            limit, value = limits[rule], counts[rule]
            too_low = rule == 0 or rule == 2 or rule >= 8
            if limit > 0 and (value < limit if too_low else value > limit):
                verdicts[document] = rule
                break
    return verdicts


@kernel
def _measure(
    data: NDArray[np.uint8],
    begin: int,
    end: int,
    classes: NDArray[np.uint16],
    stop_words: NDArray[np.uint8],
    stop_sizes: NDArray[np.int64],
    counts: NDArray[np.float64],
) -> None:
    """Fill `counts` with what each rule compares with its limit; a ratio to nothing is not a number, and passes."""
    words = texts = letters = alphabetic = 0
    seen = np.zeros(len(stop_sizes), np.bool_)
    at = begin
    while True:
        start, at, length, bits = next_word(data, at, end, classes)
        if start == end:
            break
        words += 1
        alphabetic += bits & ALPHA != 0
        if bits & TEXT:
            texts += 1
            letters += length
        if at - start <= stop_words.shape[1]:
            for row in range(len(stop_sizes)):
                if stop_sizes[row] == at - start and not seen[row]:
                    same = True
                    for byte in range(at - start):
                        same &= stop_words[row, byte] == data[start + byte]
                    seen[row] |= same
    hashes, ellipses = _symbols(data, begin, end)
    lines, bullets, trailing = _lines(data, begin, end, classes)
    counts[0] = counts[1] = texts
    counts[2] = counts[3] = letters / np.float64(texts)
    counts[4] = hashes / np.float64(words)
    counts[5] = ellipses / np.float64(words)
    counts[6] = bullets / np.float64(lines)
    counts[7] = trailing / np.float64(lines)
    counts[8] = alphabetic / np.float64(words)
    counts[9] = 0
    for row in range(len(stop_sizes)):
        counts[9] += seen[row]


@kernel
def _symbols(data: NDArray[np.uint8], begin: int, end: int) -> tuple[int, int]:
    """How often `#` occurs, and an ellipsis: three full stops or the one character."""
    hashes = ellipses = 0
    at = begin
    while at < end:
        byte = data[at]
        if byte == HASH:
            hashes += 1
        elif byte == DOT and at + 2 < end and data[at + 1] == DOT and data[at + 2] == DOT:
            ellipses += 1
            at += 2
        elif byte == 0xE2 and data[at + 1] == 0x80 and data[at + 2] == 0xA6:
            ellipses += 1
            at += 2
        at += 1
    return hashes, ellipses


@kernel
def _lines(data: NDArray[np.uint8], begin: int, end: int, classes: NDArray[np.uint16]) -> tuple[int, int, int]:
    """The number of lines, of those that start with a bullet, and of those that end with an ellipsis."""
    lines = bullets = trailing = 0
    at = begin
    while at < end:
        stop, after = line_end(data, at, end, classes)
        lines += 1
        while at < stop:
            point, size = decode(data, at)
            if not classes[point] & SPACE:
                bullets += point == BULLETS[0] or point == BULLETS[1]
                break
            at += size
        last = stop
        while at < last:
            step = last - 1
            while data[step] & 0xC0 == 0x80:
                step -= 1
            point, _ = decode(data, step)
            if not classes[point] & SPACE:
                trailing += point == ELLIPSIS or (
                    last - at >= 3 and data[last - 1] == DOT and data[last - 2] == DOT and data[last - 3] == DOT
                )
                break
            last = step
        at = after
    return lines, bullets, trailing
