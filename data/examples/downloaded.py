"""The rows of a downloaded source, such as a set of conversations from the hub, to be read as examples."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from data.documents import open_raw
from data.formats.jsonl import numbered_lines
from data.formats.streams import BrokenStream
from data.manifest import MANIFEST, RawFile, load_raw_manifest

BATCH_ROWS = 1000


def is_source(path: Path) -> bool:
    """Whether `path` is the folder of a downloaded source."""
    return (path / MANIFEST).is_file()


def source_rows(folder: Path, keys: Collection[str]) -> Iterator[tuple[str, bytes | dict[str, Any] | None]]:
    """Place and content of every row: a line of JSON Lines (None where it is too long), or columns `keys` of Parquet.

    A file that cannot be read to its end counts as one more row, that is None. Raises `UserError` as
    `data.manifest.load_raw_manifest` and `data.published.opening.open_published` do.
    """
    manifest = load_raw_manifest(folder)
    for raw in manifest.files:
        with open_raw(folder, manifest, raw) as file:
            rows = _parquet_rows(file, raw, keys) if raw.path.endswith(".parquet") else _lines(file, raw)
            for number, row in islice(rows, raw.documents):
                yield f"{folder / raw.path}:{number}", row


def _lines(file: IO[bytes], raw: RawFile) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    try:
        for number, line in numbered_lines(file, raw.path.lower()):
            yield number, line
    except BrokenStream:
        yield number + 1, None


def _parquet_rows(file: IO[bytes], raw: RawFile, keys: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    import pyarrow.parquet as pq

    from data.formats.parquet import UNREADABLE

    number = 0
    try:
        content = pq.ParquetFile(file, buffer_size=1 << 20)
        columns = [name for name in content.schema_arrow.names if name in keys]
        for batch in content.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                yield number, {key: value for key, value in row.items() if value is not None}
                number += 1
    except UNREADABLE:
        yield number, None
