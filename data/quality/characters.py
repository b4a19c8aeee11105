"""What the rules need to know about each character, as a table of bits by code point.

White space, letters and line breaks are Python's own (`str.isspace`, `str.isalpha`, `str.splitlines`); punctuation and
the marks that end a line are datatrove's sets, so that its filters and these rules mean the same by a character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SPACE = 1  # white space
BREAK = 2  # ends a line, as `str.splitlines` has it
WORD = 4  # letter, digit, underscore, combining mark, joiner: a run of these is a word
ALPHA = 8  # letter
DIGIT = 16  # decimal digit
TEXT = 32  # not in datatrove's punctuation set; a word without any such character is a symbol
TERMINAL = 64  # ends a line as a sentence would, in any script (datatrove's set)
APOSTROPHE = 128  # joins two words into one
POINT = 256  # joins two words into one, too: full stop
COMMA = 512  # joins two numbers into one
CLOSER = 1024  # quotation mark or bracket after the end of a sentence
ENDER = 2048  # ends a sentence where white space or the end of the line follows
FULL_ENDER = 4096  # ends a sentence whatever follows, in scripts that put no space between sentences

CODE_POINTS = 0x110000
ASSIGNED = (range(0xD800), range(0xE000, 0x33480), range(0xE0000, 0xE01F0))  # no character has a class outside these


@lru_cache(maxsize=1)
def character_classes() -> NDArray[np.uint16]:
    """The bits of every code point, (0x110000,) uint16."""
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

    classes = np.zeros(CODE_POINTS, np.uint16)
    classes[:] = TEXT
    for points in ASSIGNED:
        characters = [chr(point) for point in points]
        block = classes[points.start : points.stop]
        _mark(block, characters, SPACE, str.isspace)
        _mark(block, characters, ALPHA, str.isalpha)
        _mark(block, characters, DIGIT, str.isdecimal)
        _mark(block, characters, WORD, lambda character: character.isalnum() or _is_mark(character))
    _set(classes, "_\u200c\u200d", WORD)
    _set(classes, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", BREAK)
    _set(classes, "".join(TERMINAL_PUNCTUATION), TERMINAL)
    _set(classes, "'\u2019", APOSTROPHE)
    _set(classes, ".", POINT)
    _set(classes, ",", COMMA)
    _set(classes, ")]}\"'\u201d\u2019\u00bb\u300d\u300f\uff09", CLOSER)
    _set(classes, ".!?\u2026", ENDER)
    _set(classes, "".join(mark for mark in TERMINAL_PUNCTUATION if not mark.isascii()), FULL_ENDER)
    classes[[ord(character) for character in PUNCTUATION_SET]] &= np.uint16(0xFFFF ^ TEXT)
    classes.setflags(write=False)
    return classes


def _is_mark(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character)[0] == "M"


def _mark(block: NDArray[np.uint16], characters: list[str], bit: int, has: Callable[[str], bool]) -> None:
    block[np.fromiter(map(has, characters), bool, len(characters))] |= np.uint16(bit)


def _set(classes: NDArray[np.uint16], characters: str, bit: int) -> None:
    classes[[ord(character) for character in characters]] |= np.uint16(bit)
