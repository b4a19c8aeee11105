"""C4's last rule: documents with a word of a list are dropped. The list is the user's own file; none is downloaded."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.errors import UserError

RULES = ("document_removed_with_badwords",)
UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")  # Thai, Japanese, Chinese: words without borders


class BadWords(NamedTuple):
    """The words of a file, and what finds one that stands by itself."""

    words: list[str]
    pattern: re.Pattern[str]


@lru_cache(maxsize=4)
def load(path: str) -> BadWords:
    """The words of a UTF-8 file, one or several in each line; `UserError` if there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.preprocess.quality.c4.bad_words_file: {path} cannot be read as UTF-8 text. "
            "Give a file with one word in each line, or null."
        ) from error
    words = sorted({line.strip().lower() for line in lines} - {""})
    if not words:
        raise UserError(f"data.preprocess.quality.c4.bad_words_file: {path} holds no words. Give another one, or null.")
    spaced = "|".join(re.escape(word) for word in words if not UNSPACED.search(word))
    unspaced = "|".join(re.escape(word) for word in words if UNSPACED.search(word))
    patterns = [rf"(?:\W|^)(?:{spaced})(?:\W|$)" if spaced else "", unspaced]
    return BadWords(words, re.compile("|".join(filter(None, patterns))))


def find(texts: pl.Series, bad: BadWords) -> NDArray[np.int8]:
    """For each text 0 if it holds a bad word, -1 otherwise."""
    verdicts = np.full(len(texts), -1, np.int8)
    lowered = pl.Series([text.lower() for text in texts], dtype=pl.String)
    for row in np.flatnonzero(lowered.str.contains_any(bad.words).to_numpy()):
        if bad.pattern.search(lowered[int(row)]):
            verdicts[row] = 0
    return verdicts
