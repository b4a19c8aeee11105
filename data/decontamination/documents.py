"""Dropping or cutting documents that share an n-gram with an evaluation set.

After Brown et al., 2020 (GPT-3), appendix C: words of lower case without punctuation, runs of 13 of them; `cut` takes
out what is found with 200 characters on either side, forgets pieces shorter than 200 characters, and drops documents
that fall into more than 10 pieces. Here punctuation also ends a word, the pieces stay one document (parted by a blank
line), and an n-gram counts however many documents hold it, where GPT-3 ignored those in more than ten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl

from config.deduplication import DecontaminationConfig
from data.decontamination.grams import Grams, find_grams
from data.texts import texts_of

RULE = "contaminated"
CUT = "contaminated-passage"


class Hit(NamedTuple):
    """The first n-gram of an evaluation set in a document."""

    source: int
    id: str
    set: str
    ngram: str
    """As it is written in the document."""


@dataclass
class Decontaminated:
    """What became of a frame of documents."""

    kept: pl.DataFrame
    dropped: pl.DataFrame
    """With the rule in column `rule`."""
    hits: list[Hit] = field(default_factory=list)
    trimmed: int = 0
    """Kept documents with passages cut out."""
    trimmed_bytes: int = 0
    passages: int = 0


def decontaminate(frame: pl.DataFrame, grams: Grams, config: DecontaminationConfig) -> Decontaminated:
    """Judge every document by its column `text`."""
    found = find_grams(texts_of(frame["text"]), grams)
    result = Decontaminated(frame, frame.clear().with_columns(pl.lit("", pl.String).alias("rule")))
    if not len(found):
        return result
    texts, doomed = frame["text"].to_list(), np.zeros(len(frame), bool)
    for rows in np.split(found, np.flatnonzero(np.diff(found[:, 0])) + 1):
        row = int(rows[0, 0])
        raw = texts[row].encode()
        for number, name in enumerate(config.sets):
            for _, start, end, _ in rows[rows[:, 3] >> number & 1 == 1][:1]:
                ngram = raw[start:end].decode()
                result.hits.append(Hit(frame["source"][row], frame["id"][row], name, ngram))
        cut = None if config.action == "drop" else cut_out(texts[row], _characters(raw, rows[:, 1:3].tolist()), config)
        if cut is None:
            doomed[row] = True
            continue
        texts[row], passages = cut
        result.trimmed += 1
        result.trimmed_bytes += len(raw) - len(texts[row].encode())
        result.passages += passages
    whole = frame.with_columns(pl.Series("text", texts, dtype=pl.String))
    gone = pl.Series(doomed)
    result.kept = whole.filter(~gone)
    result.dropped = whole.filter(gone).with_columns(pl.lit(RULE).alias("rule"))
    return result


def cut_out(text: str, spans: list[tuple[int, int]], config: DecontaminationConfig) -> tuple[str, int] | None:
    """`text` without `spans` (of characters, ascending) and the window around each, and how many passages that were.

    None where it falls into too many pieces, or none of them is long enough.
    """
    passages: list[list[int]] = []
    for start, end in spans:
        start, end = max(0, start - config.window_characters), min(len(text), end + config.window_characters)
        if passages and start <= passages[-1][1]:
            passages[-1][1] = max(end, passages[-1][1])
        else:
            passages.append([start, end])
    edges = [0, *[edge for passage in passages for edge in passage], len(text)]
    pieces = [piece for piece in (text[a:b].strip() for a, b in zip(edges[::2], edges[1::2])) if piece]
    kept = [piece for piece in pieces if len(piece) >= config.min_piece_characters]
    if len(pieces) > config.max_pieces or not kept:
        return None
    return "\n\n".join(kept), len(passages)


def _characters(raw: bytes, spans: list[list[int]]) -> list[tuple[int, int]]:
    """Spans of bytes of UTF-8 as spans of characters."""
    data = np.frombuffer(raw, np.uint8)
    before = np.concatenate([[0], np.cumsum(data & 0xC0 != 0x80)])
    return [(int(before[start]), int(before[end])) for start, end in spans]
