"""Lines or paragraphs that stand in several places of the corpus: all but the first are taken out.

1. `LineStage`, a part of the corpus per task: a hash of every line that is long enough, sorted.
2. `RepeatedLineStage`, a range of hashes per task: which of them occur `min_occurrences` times or more, within a
   document or across; all places but the first in the order of the corpus are listed.
3. `Selection` takes them out when it reads a part, and drops documents of which too little is left.

Lines are compared without the white space around them, by 64 bits of XXH3: among a billion different lines one pair is
expected to be confused with a probability of 3 %.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl
import xxhash
from numpy.typing import NDArray

from config.deduplication import LineDeduplicationConfig
from data.deduplication.tables import (
    CUT_BYTES,
    START,
    SortedRows,
    cuts_for,
    read_slices,
    read_starts,
    write_rows,
)
from data.pipeline.executor import Stage, advance

if TYPE_CHECKING:
    from data.deduplication.selection import Selection

SEPARATORS = {"lines": re.compile(r"(\n)"), "paragraphs": re.compile(r"(\n[ \t]*\n\s*)")}
RULES: dict[str, str] = {"lines": "duplicate-line", "paragraphs": "duplicate-paragraph"}
LINE = np.dtype([("hash", "<u8"), ("document", "<u4"), ("line", "<u4")])
PLACE = np.dtype([("part", "<u4"), ("document", "<u4"), ("line", "<u4")])
HASH_BITS = 64


def line_cuts(size: int, config: LineDeduplicationConfig) -> int:
    """Into how many ranges of hashes the lines of `size` bytes of text are cut at most, so that one fits memory."""
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
    return rows[by_hash(rows)]


def by_hash(rows: NDArray[np.void]) -> NDArray[np.intp]:
    """What sorts `LINE`s, equal ones staying as they are."""
    return np.argsort(rows["hash"], kind="stable")


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
    """The hashed lines of each part (`00000.lines`) and where their cuts lie (`00000.starts`)."""

    name = "lines"

    def __init__(
        self,
        selection: Selection,
        config: LineDeduplicationConfig,
        cuts: int,
        folder: Path,
        most: int = CUT_BYTES,
    ) -> None:
        """`most` bytes of hashed lines are held in memory."""
        super().__init__()
        self.selection = selection
        self.config = config
        self.cuts = cuts
        self.folder = folder
        self.most = most

    def work(self, part: int, parts: int) -> None:
        path = self.folder / f"{part:05d}.lines"
        table = SortedRows(path, LINE, by_hash, lambda rows: rows["hash"], HASH_BITS, self.cuts, self.most)
        documents = 0
        for texts in self.selection.texts(part, parts):
            rows = hash_lines(texts, self.config)
            rows["document"] += np.uint32(documents)
            table.add(rows)
            documents += len(texts)
            advance(len(texts))
            del texts  # or two ranges would be in memory at once
        write_rows(path.with_suffix(".starts"), table.write())


class RepeatedLineStage(Stage):
    """Places to take out, by part (`00000.places`), and where those of each part begin (`00000.starts`)."""

    name = "repeated-lines"

    def __init__(
        self, config: LineDeduplicationConfig, parts: int, cuts: int, hashed: Path, starts: Path, folder: Path
    ) -> None:
        """Each task takes several of the `cuts`."""
        super().__init__()
        self.config = config
        self.parts = parts
        self.cuts = cuts
        self.hashed = hashed
        self.starts = starts
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        bounds = read_starts(self.starts, self.parts, self.cuts * part // parts, self.cuts * (part + 1) // parts)
        rows, owners = read_slices([self.hashed / f"{n:05d}.lines" for n in range(self.parts)], bounds, LINE)
        order = by_hash(rows)  # equal ones stay in the order of the corpus
        _, counts = np.unique(rows["hash"], return_counts=True)
        first_of_each = np.cumsum(counts) - counts
        doomed = np.repeat(counts >= self.config.min_occurrences, counts)
        doomed[first_of_each] = False
        places = np.empty(int(doomed.sum()), PLACE)
        chosen = np.sort(order[doomed])  # the order of the slices: by part
        places["part"] = owners[chosen]
        places["document"], places["line"] = rows["document"][chosen], rows["line"][chosen]
        write_rows(self.folder / f"{part:05d}.places", places)
        starts = np.searchsorted(places["part"], np.arange(self.parts + 1))
        write_rows(self.folder / f"{part:05d}.starts", starts.astype(START))


class Places(NamedTuple):
    """Where the lines to take out are listed: in so many files, and where those of each part begin in them."""

    folder: Path
    files: int
    starts: Path

    def of(self, part: int) -> NDArray[np.void]:
        """The lines to take out of the documents of a part, as `PLACE`, by document."""
        bounds = read_starts(self.starts, self.files, part, part + 1)
        rows, _ = read_slices([self.folder / f"{file:05d}.places" for file in range(self.files)], bounds, PLACE)
        return rows[np.argsort(rows["document"], kind="stable")]


def by_document(places: NDArray[np.void], first: int, last: int) -> dict[int, list[int]]:
    """Of `places` those of documents first ... last - 1, as lists of lines by the document's number after `first`."""
    start, end = np.searchsorted(places["document"], [first, last])
    found: dict[int, list[int]] = {}
    for row in places[start:end]:
        found.setdefault(int(row["document"]) - first, []).append(int(row["line"]))
    return found
