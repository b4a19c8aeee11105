"""Which documents are left, and what of them: what every stage after the first one reads.

The order of the corpus is cut into parts, of which a task reads one, and each part into ranges, of which it holds one
in memory. A document is named by its part and its index among the part's documents without exact duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.schema import PreprocessConfig
from data.deduplication.lines import RULES, Places, by_document, without_lines
from data.deduplication.tables import read_rows
from data.funnel import Funnel
from data.pipeline.keys import drop_duplicates, key_range
from data.pipeline.runs import RUN_SCHEMA, RunReader, Runs

NEAR_DUPLICATE = "near-duplicate"
INDEX = np.dtype("<u4")


@dataclass
class Selected:
    """The documents of one range, in the order of the corpus."""

    kept: pl.DataFrame
    dropped: pl.DataFrame
    """Those dropped, with the rule that did in column `rule`."""
    trimmed: list[tuple[int, int, int]] = field(default_factory=list)
    """Of each document that lost lines its source, the bytes lost and the number of lines."""

    def drop(self, doomed: pl.Series, rule: str) -> None:
        """Move the kept documents for which `doomed` is true to the dropped ones."""
        gone = self.kept.filter(doomed).with_columns(pl.lit(rule).alias("rule"))
        self.kept, self.dropped = self.kept.filter(~doomed), pl.concat([self.dropped, gone])


@dataclass(frozen=True)
class Selection:
    """The corpus as far as it is decided: the sorted runs, and what later stages found to be removed."""

    runs: Runs
    settings: PreprocessConfig
    ranges: int = 1
    """Into how many ranges each part is cut."""
    near: Path | None = None
    """The folder with the near-duplicates to remove, in datatrove's format: indices as uint32 in `000000.remove`."""
    lines: Places | None = None
    """The places of the lines to take out."""

    def read(self, part: int, parts: int) -> Iterator[Selected]:
        """The documents of a part, range by range."""
        near = None if self.near is None else read_rows(removal_path(self.near, part), INDEX)
        places = None if self.lines is None else self.lines.of(part)
        first = first_left = 0  # documents of earlier ranges: without exact duplicates, and without near ones
        with RunReader(self.runs.of(part)) as reader:
            for number in range(part * self.ranges, (part + 1) * self.ranges):
                selected = self._once(reader.read(*key_range(number, parts * self.ranges)))
                count = len(selected.kept)
                if near is not None:
                    selected.drop(pl.Series(_within(near, first, count)), NEAR_DUPLICATE)
                first += count
                count = len(selected.kept)
                if places is not None:
                    self._trim(selected, by_document(places, first_left, first_left + count))
                first_left += count
                yield selected
                del selected  # or two ranges would be in memory at once

    def texts(self, part: int, parts: int) -> Iterator[pl.Series]:
        """The texts of the documents of a part, range by range."""
        return map(lambda selected: selected.kept["text"], self.read(part, parts))

    def _once(self, frame: pl.DataFrame) -> Selected:
        """Without exact duplicates, if so wanted."""
        if self.settings.exact_deduplication:
            return Selected(*drop_duplicates(frame))
        return Selected(frame, _nothing_dropped())

    def _trim(self, selected: Selected, places: dict[int, list[int]]) -> None:
        """Take out repeated lines; drop the documents of which too little is left."""
        unit, least = self.settings.line_deduplication.unit, self.settings.filter.min_characters
        texts, sources = selected.kept["text"].to_list(), selected.kept["source"]
        doomed = np.zeros(len(texts), bool)
        for document, lines in places.items():
            before, texts[document] = texts[document], without_lines(texts[document], unit, lines)
            lost = len(before.encode()) - len(texts[document].encode())
            selected.trimmed.append((sources[document], lost, len(lines)))
            doomed[document] = len(texts[document]) < least or not texts[document].strip()
        selected.kept = selected.kept.with_columns(pl.Series("text", texts, dtype=pl.String))
        selected.drop(pl.Series(doomed), RULES[unit])


def _within(indices: NDArray[Any], first: int, count: int) -> NDArray[np.bool_]:
    """Which of `count` documents from `first` on are among ascending `indices`."""
    start, end = np.searchsorted(indices, [first, first + count])
    marks = np.zeros(count, bool)
    marks[indices[start:end].astype(np.int64) - first] = True
    return marks


def count_trimmed(funnels: list[Funnel], selected: Selected, unit: str) -> None:
    """Enter what was taken out of documents into the funnels of their sources."""
    for source, size, lines in selected.trimmed:
        funnels[source].trim(1, size, {RULES[unit]: lines})


def removal_path(folder: Path, part: int) -> Path:
    """Where the near-duplicates of `part` are listed."""
    return folder / f"{part:06d}.remove"


def _nothing_dropped() -> pl.DataFrame:
    return RUN_SCHEMA.to_frame().with_columns(pl.lit("", pl.String).alias("rule"))
