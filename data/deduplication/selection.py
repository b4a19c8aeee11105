"""Which documents of a key range are left, and what of them: what every stage after the first one reads.

A document is named by its range and its index among the range's documents without exact duplicates, in corpus order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from config.schema import PreprocessConfig
from data.deduplication.lines import RULES, read_places, without_lines
from data.deduplication.tables import read_rows
from data.funnel import Funnel
from data.pipeline.keys import drop_duplicates, key_range
from data.pipeline.runs import RUN_SCHEMA, read_range

NEAR_DUPLICATE = "near-duplicate"
INDEX = np.dtype("<u4")


@dataclass
class Selected:
    """The documents of one range, in corpus order."""

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
    """The corpus as far as it is decided: the runs of the first stage, and what later stages found to be removed."""

    runs: tuple[Path, ...]
    settings: PreprocessConfig
    near: Path | None = None
    """The folder with the near-duplicates to remove, in datatrove's format: indices as uint32 in `000000.remove`."""
    lines: Path | None = None
    """The folder with the places of the lines to take out."""
    line_cuts: int = 0

    def read(self, part: int, parts: int) -> Selected:
        """The documents of range `part`."""
        frame = read_range(list(self.runs), *key_range(part, parts))
        selected = Selected(frame, _nothing_dropped())
        if self.settings.exact_deduplication:
            selected = Selected(*drop_duplicates(frame))
        if self.near is not None:
            near = np.zeros(len(selected.kept), bool)
            near[read_rows(removal_path(self.near, part), INDEX)] = True
            selected.drop(pl.Series(near), NEAR_DUPLICATE)
        if self.lines is not None:
            self._trim(selected, part)
        return selected

    def _trim(self, selected: Selected, part: int) -> None:
        """Take out repeated lines; drop the documents of which too little is left."""
        assert self.lines is not None
        unit, least = self.settings.line_deduplication.unit, self.settings.filter.min_characters
        texts, sources = selected.kept["text"].to_list(), selected.kept["source"]
        doomed = np.zeros(len(texts), bool)
        for document, lines in read_places(self.lines, self.line_cuts, part).items():
            before, texts[document] = texts[document], without_lines(texts[document], unit, lines)
            lost = len(before.encode()) - len(texts[document].encode())
            selected.trimmed.append((sources[document], lost, len(lines)))
            doomed[document] = len(texts[document]) < least or not texts[document].strip()
        selected.kept = selected.kept.with_columns(pl.Series("text", texts, dtype=pl.String))
        selected.drop(pl.Series(doomed), RULES[unit])


def count_trimmed(funnels: list[Funnel], selected: Selected, unit: str) -> None:
    """Enter what was taken out of documents into the funnels of their sources."""
    for source, size, lines in selected.trimmed:
        funnels[source].trim(1, size, {RULES[unit]: lines})


def removal_path(folder: Path, part: int) -> Path:
    """Where the near-duplicates of range `part` are listed."""
    return folder / f"{part:06d}.remove"


def _nothing_dropped() -> pl.DataFrame:
    return RUN_SCHEMA.to_frame().with_columns(pl.lit("", pl.String).alias("rule"))
