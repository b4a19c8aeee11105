"""File formats that documents are read from, one module per format, chosen by the suffix of a file's name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import IO

from data.formats.rows import Fault, Keep, Row, Wanted, excerpt_of
from data.pipeline.markup import is_page

COMPRESSIONS = (".gz", ".bz2", ".zst")
PROSE = (".txt", ".md")
PACKABLE = (".warc", ".warc.wet", *PROSE, ".jsonl", ".csv", ".xml")
ALONE = (".parquet", ".json.gz", ".json.zst")
SUFFIXES = (*ALONE, *[base + packed for base in PACKABLE for packed in ("", *COMPRESSIONS)])
"""Names that a readable file may end in."""
READABLE = f"{', '.join(ALONE)}, and {' '.join(PACKABLE)}, each also as {' '.join(COMPRESSIONS)}"
"""The same in words."""
SPLITTABLE = (".parquet", ".xml.bz2")
"""Suffixes of files of which a part is read without what stands before it."""
DOCUMENT_BYTES = 1_000_000


def suffix_of(path: str) -> str | None:
    """The suffix by which `path` is read, such as `.jsonl.gz`, or None where no format knows it."""
    return next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), None)


def read_rows(
    file: IO[bytes],
    path: str,
    text_column: str,
    *,
    wanted: Wanted = lambda unit: True,
    limit: int | None = None,
    with_columns: bool = False,
    document_bytes: int = DOCUMENT_BYTES,
    keep: Keep | None = None,
    cut: bool = False,
) -> Iterator[Row | Fault]:
    """The rows of an open binary file whose format the suffix of `path` tells; memory is bounded by the longest row.

    `wanted` chooses the units to read (row groups, blocks of rows, pieces of a text file), `limit` the number of rows,
    `with_columns` asks for the short columns beside the text, `document_bytes` is where a long text file is cut.
    Rows that `keep` leaves out are reported as faults whose reason is `left-out`, one for each unit. With `cut`, the
    file is the beginning of another one, and its end is no fault.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"no format for {path}")
    if not suffix.startswith(PROSE) and (page := _web_page(file)) is not None:
        return iter([Fault(0, "html-page", page)] if wanted(0) else [])
    if suffix == ".parquet":
        from data.formats.parquet import read_parquet

        return read_parquet(file, text_column, wanted, limit, with_columns, keep)
    path = path.lower()
    if suffix.startswith(".json"):
        from data.formats.jsonl import read_jsonl

        return read_jsonl(file, path, text_column, wanted, limit, with_columns, keep)
    if suffix.startswith(".csv"):
        from data.formats.delimited import read_csv

        return read_csv(file, path, text_column, wanted, limit, with_columns, keep)
    if suffix.startswith(".xml"):
        from data.formats.mediawiki import read_dump

        return islice(read_dump(file, path, wanted, cut), limit)
    if suffix.startswith(".warc"):
        from data.formats.warc import read_warc

        return read_warc(file, path, wanted, limit)
    from data.formats.plain import read_text

    return read_text(file, path, wanted, limit, document_bytes)


def count_rows(
    file: IO[bytes], path: str, text_column: str, *, document_bytes: int = DOCUMENT_BYTES, cut: bool = False
) -> int:
    """Rows of an open file, faulty ones included: what `limit` counts. Parquet tells, other formats must be read.

    With `cut`, the file is the beginning of another one, and only rows that are whole for certain are counted.
    """
    suffix = suffix_of(path) or ""
    if suffix == ".parquet":
        from data.formats.parquet import count_parquet_rows

        return count_parquet_rows(file)
    if suffix.startswith((".json", ".xml", ".warc")) and _web_page(file) is not None:
        return 1
    if suffix.startswith(".json"):
        from data.formats.jsonl import count_lines

        return count_lines(file, path.lower(), cut)
    if suffix.startswith(".xml"):
        from data.formats.mediawiki import count_articles

        return count_articles(file, path.lower(), cut)
    if suffix.startswith(".warc"):
        from data.formats.warc import count_pages

        return count_pages(file, path.lower(), cut)
    rows = before_last = 0
    for row in read_rows(file, path, text_column, document_bytes=document_bytes):
        before_last = rows if isinstance(row, Row) else before_last
        rows += row.count if isinstance(row, Fault) else 1
    return before_last if cut else rows


def _web_page(file: IO[bytes]) -> str | None:
    """The beginning of a file that is an HTML page, as a server sends in place of one that it does not have."""
    start = file.tell()
    head = file.read(4096)
    file.seek(start)
    text = head.decode("utf-8", "replace")
    return excerpt_of(text) if is_page(text) else None
