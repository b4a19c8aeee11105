"""The rule sets that are switched on, one after the other in the order in which FineWeb applies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.quality import QualityConfig
from data.quality import bad_words, c4, fineweb, gopher_quality, gopher_repetition
from data.texts import column_of, texts_of


class Judged(NamedTuple):
    """What became of a frame of documents."""

    kept: pl.DataFrame
    """The documents that no rule dropped, without the lines that C4's rules took out."""
    dropped: pl.DataFrame
    """The others, with the name of the rule that dropped each in column `rule`."""
    trimmed: int
    """Documents with lines taken out, dropped ones by later rules included."""
    trimmed_bytes: int
    """What these lines took away."""
    lines: dict[str, int]
    """Lines taken out of these documents, by rule."""


def apply_quality(frame: pl.DataFrame, config: QualityConfig) -> Judged:
    """Judge every document by its column `text`; the first rule that applies drops it."""
    dropped: list[pl.DataFrame] = []
    trimmed, trimmed_bytes, lines = 0, 0, dict.fromkeys(c4.LINE_RULES, 0)

    def keep(verdicts: NDArray[np.int8], names: Sequence[str]) -> None:
        nonlocal frame
        rules = pl.Series("rule", verdicts, dtype=pl.Int8).replace_strict(
            list(range(-1, len(names))), [None, *names], return_dtype=pl.String
        )
        judged = frame.with_columns(rules)
        dropped.append(judged.filter(rules.is_not_null()))
        frame = judged.filter(rules.is_null()).drop("rule")

    if config.gopher_repetition.enabled:
        texts = texts_of(frame["text"])
        keep(gopher_repetition.gopher_repetition(texts, config.gopher_repetition), gopher_repetition.RULES)
    if config.gopher_quality.enabled:
        texts = texts_of(frame["text"])
        keep(gopher_quality.gopher_quality(texts, config.gopher_quality), gopher_quality.RULES)
    if config.c4.enabled:
        result = c4.c4(texts_of(frame["text"]), config.c4)
        before = frame["text"]
        frame = frame.with_columns(column_of(result.texts))
        changed = (before != frame["text"]).to_numpy()
        trimmed = int(changed.sum())
        trimmed_bytes = int(before.str.len_bytes().sum()) - int(frame["text"].str.len_bytes().sum())
        lines = dict(zip(c4.LINE_RULES, result.lines[changed].sum(0).tolist()))
        keep(result.verdicts, c4.RULES)
        if config.c4.bad_words_file is not None:
            words = bad_words.load(config.c4.bad_words_file)
            keep(bad_words.find(frame["text"], words), bad_words.RULES)
    if config.fineweb.enabled:
        keep(fineweb.fineweb(texts_of(frame["text"]), config.fineweb), fineweb.RULES)
    return Judged(frame, pl.concat(dropped) if dropped else _none(frame), trimmed, trimmed_bytes, lines)


def prepare(config: QualityConfig) -> None:
    """Compile what is switched on, so that workers find it compiled; `UserError` where a file cannot be read."""
    bad_words.load.cache_clear()
    apply_quality(pl.DataFrame({"text": ["A line that is left. " * 5] * 2}), config)


def _none(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.clear().with_columns(pl.lit("", pl.String).alias("rule"))
