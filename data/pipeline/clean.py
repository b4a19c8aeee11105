"""Mending text: mojibake, line ends, control characters, Unicode normal form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial

import polars as pl

from config.schema import CleanConfig
from data.pipeline.batches import text_bytes

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ASCII_CONTROL = bytes({*range(0x20), 0x7F} - {0x09, 0x0A})


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
    steps: list[Callable[[str], str]] = []
    if config.ftfy:
        steps.append(_mojibake())
    if config.control_characters:
        steps.append(remove_control_characters)
    if config.unicode_nfc:
        steps.append(partial(unicodedata.normalize, "NFC"))

    def mend(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return mend


def remove_control_characters(text: str) -> str:
    """`text` without control characters (ASCII and Latin-1) but for tab and newline; every line end is a newline."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text.encode().translate(None, ASCII_CONTROL).decode("ascii")
    return CONTROL.sub("", text)


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
