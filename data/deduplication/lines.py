"""Lines or paragraphs that stand in several places of the corpus: all but the first are taken out.

1. `LineStage`, a key range per task: a hash of every line that is long enough, sorted.
2. `RepeatedLineStage`, a range of hashes per task: which of them occur `min_occurrences` times or more, within a
   document or across; all places but the first in the order of the corpus are listed.
3. `Selection` takes them out when it reads a range, and drops documents of which too little is left.

Lines are compared without the white space around them, by 64 bits of XXH3: among a billion different lines one pair is
expected to be confused with a probability of 3 %.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import xxhash
from numpy.typing import NDArray

from config.deduplication import LineDeduplicationConfig
from data.deduplication.tables import borders, cuts_for, read_array, read_rows, read_slices, write_array, write_rows
from data.pipeline.executor import Stage, advance

if TYPE_CHECKING:
    from data.deduplication.selection import Selection

SEPARATORS = {"lines": re.compile(r"(\n)"), "paragraphs": re.compile(r"(\n[ \t]*\n\s*)")}
RULES: dict[str, str] = {"lines": "duplicate-line", "paragraphs": "duplicate-paragraph"}
LINE = np.dtype([("hash", "<u8"), ("document", "<u4"), ("line", "<u4")])
PLACE = np.dtype([("range", "<u4"), ("document", "<u4"), ("line", "<u4")])
HASH_BITS = 64


def line_cuts(size: int, config: LineDeduplicationConfig) -> int:
    """Into how many ranges of hashes the lines of `size` bytes of text are cut, so that one fits into memory."""
    return cuts_for(size // config.min_characters + 1, LINE.itemsize)


def hash_lines(texts: pl.Series, config: LineDeduplicationConfig) -> NDArray[np.void]:
    """The lines of all texts that are long enough, as `LINE`, by hash; equal ones by document and line."""
    split = SEPARATORS[config.unit].split
    found: list[tuple[int, int, int]] = []
    for document, text in enumerate(texts):
        for number, line in enumerate(split(text)[::2]):
            bare = line.strip()
            if len(bare) >= config.min_characters:
                found.append((xxhash.xxh3_64_intdigest(bare.encode()), document, number))
    rows = np.array(found, LINE)
    return rows[np.argsort(rows["hash"], kind="stable")]


def without_lines(text: str, unit: str, doomed: Sequence[int]) -> str:
    """`text` without the lines with these numbers, each gone with the separator after it."""
    pieces = SEPARATORS[unit].split(text)
    last, gone = len(pieces) // 2, set(doomed)
    for number in doomed:
        pieces[2 * number : 2 * number + 2] = [""] * len(pieces[2 * number : 2 * number + 2])
    while last in gone:  # nothing is left to separate at the end
        last -= 1
        if last >= 0:
            pieces[2 * last + 1] = ""
    return "".join(pieces)


class LineStage(Stage):
    """The hashed lines of each range (`00000.lines`) and where their cuts lie (`00000.npy`)."""

    name = "lines"

    def __init__(self, selection: Selection, config: LineDeduplicationConfig, cuts: int, folder: Path) -> None:
        super().__init__()
        self.selection = selection
        self.config = config
        self.cuts = cuts
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        texts = self.selection.read(part, parts).kept["text"]
        rows = hash_lines(texts, self.config)
        write_rows(self.folder / f"{part:05d}.lines", rows)
        write_array(self.folder / f"{part:05d}.npy", borders(rows["hash"], HASH_BITS, self.cuts))
        advance(len(texts))


class RepeatedLineStage(Stage):
    """Places to take out, by range (`00000.places`), and where those of each range begin (`00000.npy`)."""

    name = "repeated-lines"

    def __init__(self, config: LineDeduplicationConfig, ranges: int, hashed: Path, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.ranges = ranges
        self.hashed = hashed
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        starts = [read_array(self.hashed / f"{source:05d}.npy")[part : part + 2] for source in range(self.ranges)]
        files = [self.hashed / f"{source:05d}.lines" for source in range(self.ranges)]
        rows, ranges = read_slices([(file, *bounds.tolist()) for file, bounds in zip(files, starts)], LINE)
        order = np.argsort(rows["hash"], kind="stable")  # equal ones stay in the order of the corpus
        _, counts = np.unique(rows["hash"], return_counts=True)
        first_of_each = np.cumsum(counts) - counts
        doomed = np.repeat(counts >= self.config.min_occurrences, counts)
        doomed[first_of_each] = False
        places = np.empty(int(doomed.sum()), PLACE)
        chosen = np.sort(order[doomed])  # the order of the slices: by range
        places["range"] = ranges[chosen]
        places["document"], places["line"] = rows["document"][chosen], rows["line"][chosen]
        write_rows(self.folder / f"{part:05d}.places", places)
        write_array(self.folder / f"{part:05d}.npy", np.searchsorted(places["range"], np.arange(self.ranges + 1)))


def read_places(folder: Path, cuts: int, part: int) -> dict[int, list[int]]:
    """The lines to take out of the documents of range `part`, by the document's index."""
    places: dict[int, list[int]] = {}
    for cut in range(cuts):
        first, last = read_array(folder / f"{cut:05d}.npy")[part : part + 2].tolist()
        for row in read_rows(folder / f"{cut:05d}.places", PLACE, first, last):
            places.setdefault(int(row["document"]), []).append(int(row["line"]))
    return places
