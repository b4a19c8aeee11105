"""Near-duplicates in four stages of datatrove's design and file formats: signatures, buckets, clusters, filter.

1. `SignatureStage`, a key range per task: for each bucket a file of (hashes, document), sorted.
2. `BucketStage`, a bucket and a range of hashes per task: pairs of documents that agree in all hashes of the bucket.
3. `ClusterStage`, one task: the connected components of all pairs. The first document of each in the order of the
   corpus stays, so which one does depends neither on tasks nor on the order of the pairs.
4. The filter is `Selection`: the stages to come do not see the others.

Any of them can be put in the place of datatrove's `MinhashDedupSignature`, `MinhashDedupBuckets` and
`MinhashDedupCluster`, and its `MinhashDedupFilter` reads the last one's output. They replace them for speed and memory:
datatrove compares signatures and joins clusters in Python objects, 14 to a document, and opens all files at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from config.deduplication import NearDeduplicationConfig
from data.deduplication.selection import INDEX, Selection, removal_path
from data.deduplication.tables import borders, cuts_for, read_array, read_rows, read_slices, write_array, write_rows
from data.pipeline.executor import Stage, advance

PAIR = np.dtype(("<u4", (4,)))
SIGNATURE_BYTES = 128 << 20  # of one range, that a task holds in memory
BATCH_DOCUMENTS = 10_000


def row_type(config: NearDeduplicationConfig) -> np.dtype[Any]:
    """One line of datatrove's signature files: the hashes of one bucket, then the document's index in its range."""
    return np.dtype([("hashes", f"<u{config.precision // 8}", (config.hashes_per_bucket,)), ("document", INDEX)])


def near_ranges(documents: int, config: NearDeduplicationConfig) -> int:
    """Into how many key ranges the corpus must be cut at least, so that the signatures of one fit into memory."""
    return -(-documents * row_type(config).itemsize * config.num_buckets // SIGNATURE_BYTES)


def bucket_cuts(documents: int, config: NearDeduplicationConfig) -> int:
    """Into how many ranges of hashes each bucket is cut, so that one fits into memory."""
    return cuts_for(documents, row_type(config).itemsize)


class SignatureStage(Stage):
    """`bucket_000/00000.minhash.sig` ..., where their cuts lie (`00000.npy`) and how many documents (`00000.count`)."""

    name = "signatures"

    def __init__(self, selection: Selection, config: NearDeduplicationConfig, cuts: int, folder: Path) -> None:
        super().__init__()
        self.selection = selection
        self.config = config
        self.cuts = cuts
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        from data.deduplication.signatures import HASH_BITS

        texts = self.selection.read(part, parts).kept["text"]
        hashes, documents = self._sign(texts)
        starts = np.empty((self.config.num_buckets, self.cuts + 1), np.int64)
        rows = np.empty(len(documents), row_type(self.config))
        for bucket in range(self.config.num_buckets):
            order = np.lexsort(hashes[:, bucket, ::-1].T)
            rows["hashes"] = hashes[order, bucket]
            rows["document"] = documents[order]
            write_rows(signature_path(self.folder, bucket, part), rows)
            starts[bucket] = borders(rows["hashes"][:, 0], HASH_BITS[self.config.precision], self.cuts)
        write_array(self.folder / f"{part:05d}.npy", starts)
        write_rows(self.folder / f"{part:05d}.count", np.array([len(texts)], np.int64))

    def _sign(self, texts: pl.Series) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """Signatures of the documents that have words, shape (documents, buckets, hashes), and their indices."""
        from data.deduplication.signatures import signatures
        from data.texts import texts_of

        batches, founds = [], []
        for start in range(0, max(1, len(texts)), BATCH_DOCUMENTS):
            batch = texts[start : start + BATCH_DOCUMENTS]
            hashes, found = signatures(texts_of(batch), self.config)
            batches.append(hashes[found])
            founds.append(found)
            advance(len(batch))
        return np.concatenate(batches), np.flatnonzero(np.concatenate(founds)).astype(INDEX)


class BucketStage(Stage):
    """Pairs of documents, as datatrove's `.dups`: range and index of one, range and index of the other, uint32."""

    name = "buckets"

    def __init__(self, config: NearDeduplicationConfig, ranges: int, cuts: int, signed: Path, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.ranges = ranges
        self.cuts = cuts
        self.signed = signed
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        bucket, cut = divmod(part, self.cuts)
        starts = [read_array(self.signed / f"{n:05d}.npy")[bucket, cut : cut + 2] for n in range(self.ranges)]
        files = [signature_path(self.signed, bucket, source) for source in range(self.ranges)]
        rows, ranges = read_slices(
            [(file, *bounds.tolist()) for file, bounds in zip(files, starts)], row_type(self.config)
        )
        order = np.lexsort(rows["hashes"][:, ::-1].T)  # equal ones stay in the order of the corpus
        hashes = rows["hashes"][order]
        names = np.stack([ranges[order], rows["document"][order]], axis=1)
        same = (hashes[1:] == hashes[:-1]).all(axis=1)
        write_rows(pair_path(self.folder, bucket, cut), np.concatenate([names[:-1][same], names[1:][same]], axis=1))


class ClusterStage(Stage):
    """All documents but the first of every cluster, as datatrove's `.remove`; one task, 4 bytes for every document."""

    name = "clusters"

    def __init__(self, buckets: int, ranges: int, cuts: int, signed: Path, pairs: Path, folder: Path) -> None:
        super().__init__()
        self.buckets = buckets
        self.ranges = ranges
        self.cuts = cuts
        self.signed = signed
        self.pairs = pairs
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        from data.deduplication.components import join

        counts = [int(read_rows(self.signed / f"{n:05d}.count", np.dtype(np.int64))[0]) for n in range(self.ranges)]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        parents = np.arange(starts[-1], dtype=np.uint32 if starts[-1] < 1 << 32 else np.uint64)
        for bucket in range(self.buckets):
            for cut in range(self.cuts):
                pairs = read_rows(pair_path(self.pairs, bucket, cut), PAIR).astype(np.int64)
                join(parents, starts[pairs[:, 0]] + pairs[:, 1], starts[pairs[:, 2]] + pairs[:, 3])
        for source in range(self.ranges):
            own = parents[starts[source] : starts[source + 1]]
            removed = np.flatnonzero(own != np.arange(starts[source], starts[source + 1]))
            write_rows(removal_path(self.folder, source), removed.astype(INDEX))


def signature_path(folder: Path, bucket: int, part: int) -> Path:
    """Where datatrove looks for the signatures of range `part` in one bucket."""
    return folder / f"bucket_{bucket:03d}" / f"{part:05d}.minhash.sig"


def pair_path(folder: Path, bucket: int, cut: int) -> Path:
    """Where datatrove looks for the pairs of one range of hashes of one bucket."""
    return folder / f"{bucket:05d}_{cut:02d}.dups"
