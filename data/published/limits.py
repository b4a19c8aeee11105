"""How much of a source is taken: whole files in their order up to the limit, and the beginning of the next one.

The beginning of a line-based or packed file is its first bytes; of a Parquet file, its first rows, as many as those
bytes are of the file. Which rows these are depends on the listing and the limit alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, cast

from data.formats import count_rows
from data.published.listing import ListedFile
from data.published.opening import Beginning, open_published
from data.transport.clients import client_for
from data.transport.probe import probe
from data.transport.slots import CONNECTIONS


@dataclass(frozen=True)
class Chosen:
    """A file to take: all of it, or the first `take` bytes."""

    file: ListedFile
    take: int | None = None


def choose(files: Sequence[ListedFile], limit: int | None, connections: int = CONNECTIONS) -> Iterator[Chosen]:
    """The files to take so that they have at most `limit` bytes together. Asks for sizes that are not listed."""
    if limit is None:
        yield from map(Chosen, files)
        return
    left = limit
    for file in files:
        if left <= 0:
            return
        file = known(file, connections)
        if file.size is None or file.size > left:
            yield Chosen(file, left)
            return
        yield Chosen(file)
        left -= file.size


def known(file: ListedFile, connections: int, stop: threading.Event | None = None) -> ListedFile:
    """The file with its size and ETag, asked for where they are missing and the server tells them."""
    if file.size is not None or not file.url.startswith(("http://", "https://")):
        return file
    size, etag = probe(client_for(file.url), file.url, connections, stop)
    return replace(file, size=size, etag=etag)


def known_all(files: Sequence[ListedFile], connections: int) -> list[ListedFile]:
    """`known` for many files, so many at a time."""
    stop = threading.Event()
    with ThreadPoolExecutor(connections) as threads:
        try:
            return list(threads.map(lambda file: known(file, connections, stop), files))
        finally:
            stop.set()  # so that Ctrl-C need not wait for threads that wait for a connection


def cut_short(chosen: Sequence[Chosen], files: Sequence[ListedFile]) -> bool:
    """Whether a limit in bytes left something of `files` out."""
    return len(chosen) < len(files) or bool(chosen) and chosen[-1].take is not None


def taken_bytes(chosen: Sequence[Chosen]) -> int:
    """Bytes of what was chosen, as far as they are known."""
    return sum(choice.file.size or 0 if choice.take is None else choice.take for choice in chosen)


def rows_there(choice: Chosen, text_column: str, document_bytes: int, connections: int = CONNECTIONS) -> int:
    """Rows of what was chosen of a file, read from where it is published."""
    file, take = choice.file, choice.take
    with open_published(file.url, file.size, file.etag, connections) as content:
        if take is None:
            return rows_of(content, choice, text_column, document_bytes)
        if file.path.endswith(".parquet"):
            return parquet_rows(content, take)
        return rows_of(cast(IO[bytes], Beginning(content, take)), choice, text_column, document_bytes)


def rows_of(content: IO[bytes], choice: Chosen, text_column: str, document_bytes: int) -> int:
    """Rows of an open file that ends where `choice` does."""
    cut = choice.take is not None
    return count_rows(content, choice.file.path, text_column, document_bytes=document_bytes, cut=cut)


def parquet_rows(file: IO[bytes], take: int) -> int:
    """Rows at the beginning of an open Parquet file that fill about `take` bytes of it."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    rows, left = 0, take
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        packed = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if packed > left:
            return rows + int(group.num_rows * left // packed)
        rows, left = rows + group.num_rows, left - packed
    return rows


def copy_rows(file: IO[bytes], rows: int, target: IO[bytes], advance: Callable[[int], None]) -> None:
    """Write the first `rows` rows of an open Parquet file to `target`, as Parquet; memory holds some MB of them."""
    import pyarrow.parquet as pq

    from data.formats.parquet import BATCH_BYTES, BUFFER_BYTES

    content = pq.ParquetFile(file, buffer_size=BUFFER_BYTES)
    wide = max(1, sum(content.metadata.row_group(group).total_byte_size for group in range(content.num_row_groups)))
    batch_rows = max(1, min(10_000, BATCH_BYTES * content.metadata.num_rows // wide))
    with pq.ParquetWriter(target, content.schema_arrow, compression="zstd") as writer:
        for batch in content.iter_batches(batch_rows, use_threads=False):
            batch = batch.slice(0, rows)
            writer.write_batch(batch)
            advance(target.tell())
            rows -= batch.num_rows
            if not rows:
                return
