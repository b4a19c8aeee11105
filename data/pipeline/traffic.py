"""What a large run reads of its own intermediate files: bytes, and files opened, by the sizes that the stages go by."""

from __future__ import annotations

import math
from typing import NamedTuple

from config.schema import PreprocessConfig
from data.deduplication.lines import LINE, line_cuts
from data.deduplication.near import SIGNATURE_BYTES, bucket_cuts, row_type
from data.pipeline.runs import BLOCK_BYTES, DIRECT_FILES, RUN_BYTES
from data.pipeline.work import parts_for

INDEX_BYTES = 40  # of a block: its keys, and its place at the end of the file


class Corpus(NamedTuple):
    """What is to be preprocessed, and the tasks it is cut into."""

    bytes: int
    documents: int
    stored: float
    """Bytes of the sorted files for each byte of text."""
    tokens: int
    """Bytes of the token files."""
    tasks: int


class Reads(NamedTuple):
    """What is read: bytes on disk, and how often a file is opened for it."""

    bytes: float = 0.0
    files: int = 0


def reads(corpus: Corpus, settings: PreprocessConfig) -> dict[str, Reads]:
    """What each stage reads of what those before it wrote, at most: as if no rule dropped anything."""
    parts, ranges = parts_for(corpus.bytes, corpus.tasks)
    merged = corpus.tasks > DIRECT_FILES
    files = 1 if merged else corpus.tasks  # that hold something of a part
    one_pass = _cut(corpus, parts * files, parts * ranges * files, parts if merged else corpus.tasks)
    found = {"clean": Reads(_merging(corpus, corpus.tasks))}
    if merged:
        cut = _cut(corpus, corpus.tasks * parts, corpus.tasks * parts, corpus.tasks)
        found["merge"] = cut._replace(bytes=cut.bytes + _merging(corpus, parts))
    near, lines = settings.near_deduplication, settings.line_deduplication
    if near.enabled:
        size = corpus.documents * row_type(near).itemsize * near.num_buckets
        tasks = near.num_buckets * bucket_cuts(corpus.documents, near)
        spilled = size if size / parts > SIGNATURE_BYTES else 0
        found["signatures"] = one_pass._replace(bytes=one_pass.bytes + spilled)
        found["buckets"] = Reads(size, tasks * (parts + 1))
        found["clusters"] = Reads(0, tasks + parts)
    if lines.unit != "off":
        tasks = line_cuts(corpus.bytes, lines)
        found["lines"] = one_pass
        found["repeated-lines"] = Reads(corpus.bytes // lines.min_characters * LINE.itemsize, tasks * (parts + 1))
        one_pass = one_pass._replace(files=one_pass.files + parts * (tasks + 1))
    if near.enabled or lines.unit != "off":
        found["survivors"] = one_pass
    found["tokenize"] = one_pass
    found["write"] = Reads(corpus.tokens, 4 * parts)
    return found


def _cut(corpus: Corpus, opened: int, cuts: int, files: int) -> Reads:
    """Reading everything once: of so many files, opened so often, in so many slices."""
    stored = corpus.bytes * corpus.stored
    blocks = math.ceil(corpus.bytes / files / BLOCK_BYTES)
    return Reads(stored + cuts * BLOCK_BYTES * corpus.stored + opened * blocks * INDEX_BYTES, 2 * opened)


def _merging(corpus: Corpus, tasks: int) -> float:
    """What the writers of sorted files read again because it did not fit one run."""
    runs = math.ceil(corpus.bytes / tasks / RUN_BYTES)
    return 0.0 if runs == 1 else (corpus.bytes + tasks * runs * runs * BLOCK_BYTES) * corpus.stored
