"""The rows of a downloaded source, such as a set of conversations from the hub, to be read as examples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from data.documents import open_raw
from data.examples.columns import Columns
from data.examples.tables import SUFFIX, table_rows
from data.formats.jsonl import numbered_lines
from data.formats.rows import Fault
from data.formats.streams import BrokenStream
from data.manifest import MANIFEST, RawFile, load_raw_manifest


def is_source(path: Path) -> bool:
    """Whether `path` is the folder of a downloaded source."""
    return (path / MANIFEST).is_file()


def source_rows(folder: Path, columns: Columns) -> Iterator[tuple[str, bytes | dict[str, Any] | Fault | None]]:
    """Place and content of every row: a line of JSON Lines (None where it is too long), or a row of Parquet.

    A file that cannot be read to its end counts as one more row, that is a fault. Raises `UserError` as
    `data.manifest.load_raw_manifest` and `data.published.opening.open_published` do.
    """
    manifest = load_raw_manifest(folder)
    for raw in manifest.files:
        with open_raw(folder, manifest, raw) as file:
            rows = table_rows(file, columns) if raw.path.endswith(SUFFIX) else _lines(file, raw)
            for number, row in islice(rows, raw.documents):
                yield f"{folder / raw.path}:{number}", row


def _lines(file: IO[bytes], raw: RawFile) -> Iterator[tuple[int, bytes | Fault | None]]:
    number = 0
    try:
        for number, line in numbered_lines(file, raw.path.lower()):
            yield number, line
    except BrokenStream as error:
        yield number + 1, Fault(number + 1, error.reason, f"the file is {error.reason}")
