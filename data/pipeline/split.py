"""The split: which text trains and which is held out.

A document is held out when the hash of its content is among the lowest `validation_fraction` of all hashes; the lowest
one always is, and the highest one never. So but for these two the choice depends on the content alone: not on order,
seed, tasks or what else is in the corpus.
Where a corpus has so few documents that the fraction would not make one of them, whole documents are too coarse a
measure (a single book!), and the last part of each is held out instead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.pipeline.keys import UINT64

MOST_TAILS = 1000


class HeldOut(NamedTuple):
    """How to divide: documents whose `split` hash is at most `threshold`, or with None the tail of each document."""

    threshold: int | None
    fraction: float


def enough_documents(fraction: float) -> int:
    """The number of different documents from which whole ones are held out."""
    return min(math.ceil(1 / fraction), MOST_TAILS)


def decisive(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.uint64]:
    """The different split hashes, ascending, that `choose_split` needs from each part of a corpus.

    They are the lowest ones, as many as show that there are enough documents, and the highest one.
    """
    different = np.unique(hashes)
    return np.unique(np.concatenate([different[: enough_documents(fraction)], different[-1:]]))


def choose_split(hashes: NDArray[np.uint64], fraction: float) -> HeldOut:
    """The split for a corpus of which `hashes` are the decisive ones of its parts, in any order."""
    different = np.unique(hashes)
    if len(different) < enough_documents(fraction):
        return HeldOut(None, fraction)
    threshold = max(int(different[0]), min(int(fraction * 2**64), UINT64))
    return HeldOut(min(threshold, int(different[-1]) - 1), fraction)


def divide(frame: pl.DataFrame, split: HeldOut) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The training and the validation part of a frame with the columns `text` and `split`, both in its order."""
    if split.threshold is not None:
        held_out = pl.col("split") <= pl.lit(split.threshold, pl.UInt64)
        return frame.filter(~held_out), frame.filter(held_out)
    cuts = [cut_position(text, split.fraction) for text in frame["text"]]
    heads = [text[:cut] for text, cut in zip(frame["text"], cuts)]
    tails = [text[cut:] for text, cut in zip(frame["text"], cuts)]
    return _with_texts(frame, heads), _with_texts(frame, tails)


def _with_texts(frame: pl.DataFrame, texts: list[str]) -> pl.DataFrame:
    return frame.with_columns(pl.Series("text", texts, dtype=pl.String)).filter(pl.col("text") != "")


def cut_position(text: str, fraction: float) -> int:
    """Where the last `fraction` of `text` begins: after a line end or space where one is near, never at the end."""
    tail = max(1, round(len(text) * fraction))
    position = max(1, len(text) - tail)
    for border in ("\n", " "):
        found = text.rfind(border, position - tail, position)
        if found > 0:
            return found + 1
    return position
