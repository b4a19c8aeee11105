"""What a person wants to see of a corpus besides its numbers: lengths, texts that stayed, texts that each rule dropped.

All of it is chosen by the documents' ids, which are hashes, so it is a fair sample and does not depend on the tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl
from pydantic import BaseModel, Field

SAMPLES = 10  # documents shown for each rule
EXCERPT = 700  # characters shown of each
KEPT_SAMPLES = 1000  # documents per corpus whose language and words are looked at, about
KEPT_EXCERPT = 2000  # characters of each
ID_BITS = 64


class Sample(BaseModel):
    """The beginning of a document, and its size in UTF-8 bytes."""

    id: str
    text: str
    bytes: int


class Survey(BaseModel):
    """What was seen of one source."""

    lengths: dict[int, int] = Field(default_factory=dict)
    """Documents that stayed, by the power of two that their characters reach: 3 stands for 8 to 15 characters."""
    kept: list[Sample] = Field(default_factory=list)
    """Some of them."""
    dropped: dict[str, list[Sample]] = Field(default_factory=dict)
    """For each rule the documents with the lowest ids among those that it dropped."""

    def add(self, other: Survey) -> None:
        """Take in what `other` saw of the same source."""
        for power, number in other.lengths.items():
            self.lengths[power] = self.lengths.get(power, 0) + number
        self.kept += other.kept
        for rule, samples in other.dropped.items():
            self.drop(rule, samples)

    def drop(self, rule: str, samples: Iterable[Sample]) -> None:
        """Consider documents that `rule` dropped."""
        known = {sample.id: sample for sample in [*self.dropped.get(rule, []), *samples]}
        self.dropped[rule] = sorted(known.values(), key=lambda sample: sample.id)[:SAMPLES]


def see_dropped(surveys: Sequence[Survey], dropped: pl.DataFrame) -> None:
    """Enter documents of `dropped`, whose column `rule` says why, into the surveys of their sources."""
    some = dropped.sort("id").group_by("source", "rule", maintain_order=True).head(SAMPLES)
    for (source, rule), frame in some.group_by("source", "rule", maintain_order=True):
        surveys[int(str(source))].drop(str(rule), _samples(frame, EXCERPT))


def see_kept(surveys: Sequence[Survey], kept: pl.DataFrame, share: float) -> None:
    """Enter the lengths of the documents in `kept`, and about `share` of them as samples."""
    power = pl.col("text").str.len_chars().cast(pl.Float64).log(2).floor().cast(pl.Int64).alias("power")
    for source, exponent, number in kept.group_by("source", power).len().sort("source", "power").rows():
        lengths = surveys[source].lengths
        lengths[exponent] = lengths.get(exponent, 0) + number
    limit = f"{min(int(share * 2**ID_BITS), 2**ID_BITS - 1):016x}"
    for (source,), frame in kept.filter(pl.col("id").str.head(ID_BITS // 4) <= limit).group_by(
        "source", maintain_order=True
    ):
        surveys[int(str(source))].kept += _samples(frame, KEPT_EXCERPT)


def _samples(frame: pl.DataFrame, characters: int) -> list[Sample]:
    columns = frame.select("id", pl.col("text").str.head(characters), pl.col("text").str.len_bytes().alias("bytes"))
    return [Sample(id=key, text=text, bytes=size) for key, text, size in columns.rows()]


def repeated_phrases(texts: Iterable[str], words: int, most: int) -> list[tuple[str, int]]:
    """The phrases of so many words that occur in the most of `texts`, with how many these are; at least in two."""
    counts: Counter[str] = Counter()
    for text in texts:
        parts = text.split()
        counts.update({" ".join(parts[at : at + words]) for at in range(len(parts) - words + 1)})
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [(phrase, number) for phrase, number in found if number > 1]
