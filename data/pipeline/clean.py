"""Mending text: HTML, mojibake, line ends, control characters, Unicode normal form, white space, addresses.

What is made for text from the web leaves program code alone; the rest is harmless to it and done to every document.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial

import polars as pl

from config.schema import CleanConfig
from data.pipeline.batches import text_bytes
from data.pipeline.code import looks_like_code
from data.pipeline.markup import is_page, page_text, piece_text
from data.pipeline.masking import mask_emails, mask_ips

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ASCII_CONTROL = bytes({*range(0x20), 0x7F} - {0x09, 0x0A})
SPACES = dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
SPACES |= {0x2028: "\n", 0x2029: "\n\n"}
UNUSUAL = {**SPACES, **dict.fromkeys((0x200B, 0x2060, 0xFEFF), "")}  # the last ones have no width
TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.M)
REPEATED = re.compile(r"(?<=[^\s])(?: [ \t]+|\t[ \t]*)")
BLANK_LINES = re.compile(r"\n{3,}")


def clean(frame: pl.DataFrame, config: CleanConfig) -> tuple[pl.DataFrame, int, int]:
    """The frame with every text mended, the number of documents that changed, and the bytes that this took away."""
    texts = frame["text"]
    mend = cleaner(config)
    mended = pl.Series("text", [mend(text) for text in texts], dtype=pl.String)
    changed = int((mended != texts).sum())
    result = frame.with_columns(mended)
    return result, changed, text_bytes(frame) - text_bytes(result)


def cleaner(config: CleanConfig) -> Callable[[str], str]:
    """The function that mends one text as `config` asks."""
    anywhere: list[Callable[[str], str]] = []
    if config.control_characters:
        anywhere.append(remove_control_characters)
    if config.unicode_nfc:
        anywhere.append(partial(unicodedata.normalize, "NFC"))
    before: list[Callable[[str], str]] = [_mojibake()] if config.ftfy else []
    after: list[Callable[[str], str]] = []
    if config.whitespace:
        after.append(normalize_whitespace)
    if config.mask_emails:
        after.append(mask_emails)
    if config.mask_ips:
        after.append(mask_ips)
    for_prose = [*before, *anywhere, *after]

    def mend(text: str) -> str:
        if config.html == "all":
            return _through(for_prose, piece_text(text))
        if config.html == "pages" and is_page(text):
            return _through(for_prose, page_text(text))
        mended = _through(for_prose, text)
        if config.keep_code and (before or after) and mended != text and looks_like_code(text):
            return _through(anywhere, text)
        return mended

    return mend


def _through(steps: list[Callable[[str], str]], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def remove_control_characters(text: str) -> str:
    """`text` without control characters (ASCII and Latin-1) but for tab and newline; every line end is a newline."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text.encode().translate(None, ASCII_CONTROL).decode("ascii")
    return CONTROL.sub("", text)


def normalize_whitespace(text: str) -> str:
    """`text` with plain spaces only, none at the end of lines, one between words, and at most one blank line.

    Indentation, and so the shape of lists, quotations and poems, stays.
    """
    if not text.isascii():
        text = text.translate(UNUSUAL)
    text = REPEATED.sub(" ", TRAILING.sub("", text))
    return BLANK_LINES.sub("\n\n", text).strip("\n")


def _mojibake() -> Callable[[str], str]:
    """ftfy, held to wrong encodings: quotes, widths, ligatures, entities and line ends stay as they were written."""
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
    )
    return lambda text: text if text.isascii() else str(ftfy.fix_text(text, config))
