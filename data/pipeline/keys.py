"""Keys: hashes of a document's content that decide where it stands, on which side of the split, and what it repeats.

All come from 128 bits of XXH3 over the text without white space, so two documents that differ in spacing alone are one
and the same to deduplication and always stand on the same side of the split.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import xxhash

WHITE_SPACE = b" \t\n\r\x0b\x0c"
SPLIT_SEED = 0x5EED0F5B117  # not data.seed, so that another order keeps the same documents held out
UINT64 = (1 << 64) - 1
ORDER = ["high", "low", "source", "id"]


def add_keys(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Add `high` and `low`, the 128-bit place in the shuffled corpus, and `split`, 64 bits for the split (uint64)."""
    high, low, split = (np.empty(len(frame), np.uint64) for _ in range(3))
    for row, text in enumerate(frame["text"]):
        content = xxhash.xxh3_128_digest(text.encode().translate(None, WHITE_SPACE))
        place = xxhash.xxh3_128_intdigest(content, seed & UINT64)
        high[row] = place >> 64
        low[row] = place & UINT64
        split[row] = xxhash.xxh3_64_intdigest(content, SPLIT_SEED)
    return frame.with_columns(pl.Series("high", high), pl.Series("low", low), pl.Series("split", split))


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame by place in the corpus; equal contents by source, then id."""
    return frame.sort(ORDER)


def repeats(frame: pl.DataFrame) -> pl.Series:
    """Which rows of a frame that is in order have the content of the row before; so the first of equals survives."""
    same = (pl.col("high") == pl.col("high").shift(1)) & (pl.col("low") == pl.col("low").shift(1))
    return frame.select(same.fill_null(False).alias("repeats")).to_series()


def drop_duplicates(frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of a frame in order, the first document of each content, and the others with the rule `exact-duplicate`."""
    repeated = repeats(frame)
    dropped = frame.filter(repeated).with_columns(pl.lit("exact-duplicate").alias("rule"))
    return frame.filter(~repeated), dropped


def key_range(part: int, parts: int) -> tuple[int, int]:
    """First and last value of `high` that belong to `part` when the order is cut into `parts` equal ranges."""
    return -(-(part << 64) // parts), -(-((part + 1) << 64) // parts) - 1
