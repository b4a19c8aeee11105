"""Near-duplicates in four stages of datatrove's design and file formats: signatures, buckets, clusters, filter.

1. `SignatureStage`, a part of the corpus per task: for each bucket a file of (hashes, document), sorted.
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
from data.deduplication.tables import SortedRows, cuts_for, read_rows, read_slices, read_starts, write_rows
from data.pipeline.executor import Stage, advance

PAIR = np.dtype(("<u4", (4,)))
SIGNATURE_BYTES = 128 << 20  # that a task holds in memory
BATCH_DOCUMENTS = 10_000


def row_type(config: NearDeduplicationConfig) -> np.dtype[Any]:
    """One line of datatrove's signature files: the hashes of one bucket, then the document's index in its part."""
    return np.dtype([("hashes", f"<u{config.precision // 8}", (config.hashes_per_bucket,)), ("document", INDEX)])


def bucket_cuts(documents: int, config: NearDeduplicationConfig) -> int:
    """Into how many ranges of hashes each bucket is cut, so that one fits into memory."""
    return cuts_for(documents, row_type(config).itemsize)


def by_hashes(rows: NDArray[Any]) -> NDArray[np.intp]:
    """What sorts rows of signatures, equal ones staying as they are."""
    return np.lexsort(rows["hashes"][:, ::-1].T)


class SignatureStage(Stage):
    """`bucket_000/00000.minhash.sig` ..., where their cuts lie (`00000.starts`), how many documents (`00000.count`)."""

    name = "signatures"

    def __init__(
        self,
        selection: Selection,
        config: NearDeduplicationConfig,
        cuts: int,
        folder: Path,
        most: int = SIGNATURE_BYTES,
    ) -> None:
        """`most` bytes of signatures are held in memory."""
        super().__init__()
        self.selection = selection
        self.config = config
        self.cuts = cuts
        self.folder = folder
        self.most = most

    def work(self, part: int, parts: int) -> None:
        tables = [self._table(bucket, part) for bucket in range(self.config.num_buckets)]
        documents = 0
        for texts in self.selection.texts(part, parts):
            self._sign(texts, documents, tables)
            documents += len(texts)
            del texts  # or two ranges would be in memory at once
        write_rows(self.folder / f"{part:05d}.starts", np.concatenate([table.write() for table in tables]))
        write_rows(self.folder / f"{part:05d}.count", np.array([documents], np.int64))

    def _table(self, bucket: int, part: int) -> SortedRows:
        from data.deduplication.signatures import HASH_BITS

        path, most = signature_path(self.folder, bucket, part), self.most // self.config.num_buckets
        bits = HASH_BITS[self.config.precision]
        return SortedRows(path, row_type(self.config), by_hashes, _first_hash, bits, self.cuts, most)

    def _sign(self, texts: pl.Series, first: int, tables: list[SortedRows]) -> None:
        """Add the signatures of the documents that have words; the first text is document `first` of the part."""
        from data.deduplication.signatures import signatures
        from data.texts import texts_of

        for start in range(0, len(texts), BATCH_DOCUMENTS):
            batch = texts[start : start + BATCH_DOCUMENTS]
            hashes, found = signatures(texts_of(batch), self.config)
            for bucket, table in enumerate(tables):
                rows = np.empty(int(found.sum()), row_type(self.config))
                rows["hashes"] = hashes[found, bucket]
                rows["document"] = np.flatnonzero(found) + first + start
                table.add(rows)
            advance(len(batch))


def _first_hash(rows: NDArray[Any]) -> NDArray[Any]:
    return rows["hashes"][:, 0]


class BucketStage(Stage):
    """Pairs of documents, as datatrove's `.dups`: part and index of one, part and index of the other, uint32."""

    name = "buckets"

    def __init__(
        self, config: NearDeduplicationConfig, parts: int, cuts: int, signed: Path, starts: Path, folder: Path
    ) -> None:
        """`starts` is what `gather_starts` made of the cuts of all parts."""
        super().__init__()
        self.config = config
        self.parts = parts
        self.cuts = cuts
        self.signed = signed
        self.starts = starts
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        bucket, cut = divmod(part, self.cuts)
        row = bucket * (self.cuts + 1) + cut
        bounds = read_starts(self.starts, self.parts, row, row + 1)
        files = [signature_path(self.signed, bucket, source) for source in range(self.parts)]
        rows, owners = read_slices(files, bounds, row_type(self.config))
        order = by_hashes(rows)  # equal ones stay in the order of the corpus
        hashes = rows["hashes"][order]
        names = np.stack([owners[order], rows["document"][order]], axis=1)
        same = (hashes[1:] == hashes[:-1]).all(axis=1)
        write_rows(pair_path(self.folder, bucket, cut), np.concatenate([names[:-1][same], names[1:][same]], axis=1))


class ClusterStage(Stage):
    """All documents but the first of every cluster, as datatrove's `.remove`; one task, 4 bytes for every document."""

    name = "clusters"

    def __init__(self, buckets: int, parts: int, cuts: int, signed: Path, pairs: Path, folder: Path) -> None:
        super().__init__()
        self.buckets = buckets
        self.parts = parts
        self.cuts = cuts
        self.signed = signed
        self.pairs = pairs
        self.folder = folder

    def work(self, part: int, parts: int) -> None:
        from data.deduplication.components import join

        counts = [int(read_rows(self.signed / f"{n:05d}.count", np.dtype(np.int64))[0]) for n in range(self.parts)]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        parents = np.arange(starts[-1], dtype=np.uint32 if starts[-1] < 1 << 32 else np.uint64)
        for bucket in range(self.buckets):
            for cut in range(self.cuts):
                pairs = read_rows(pair_path(self.pairs, bucket, cut), PAIR).astype(np.int64)
                join(parents, starts[pairs[:, 0]] + pairs[:, 1], starts[pairs[:, 2]] + pairs[:, 3])
        for source in range(self.parts):
            own = parents[starts[source] : starts[source + 1]]
            removed = np.flatnonzero(own != np.arange(starts[source], starts[source + 1]))
            write_rows(removal_path(self.folder, source), removed.astype(INDEX))


def signature_path(folder: Path, bucket: int, part: int) -> Path:
    """Where datatrove looks for the signatures of `part` in one bucket."""
    return folder / f"bucket_{bucket:03d}" / f"{part:05d}.minhash.sig"


def pair_path(folder: Path, bucket: int, cut: int) -> Path:
    """Where datatrove looks for the pairs of one range of hashes of one bucket."""
    return folder / f"{bucket:05d}_{cut:02d}.dups"
