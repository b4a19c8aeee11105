"""CSV with a header line; comma, semicolon or tab, whichever makes the text column appear."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from data.formats.rows import (
    BLOCK_ROWS,
    RECORD_BYTES,
    Fault,
    Keep,
    LeftOut,
    Row,
    Wanted,
    excerpt_of,
    plain_columns,
    row_or_fault,
)
from data.formats.streams import BrokenStream, bounded_lines, text_chunks

# Bytes that are not UTF-8 travel through the CSV parser as these.
_ESCAPED = frozenset(chr(code) for code in range(0xDC80, 0xDD00))


def read_csv(
    file: IO[bytes],
    path: str,
    text_column: str,
    wanted: Wanted,
    limit: int | None,
    with_columns: bool,
    keep: Keep | None,
) -> Iterator[Row | Fault]:
    """One row per record after the header, numbered by the line it ends on; quoted fields may span lines."""
    csv.field_size_limit(RECORD_BYTES)
    lines = _Lines(bounded_lines(text_chunks(file, path)))
    header_line = next(lines, "").removeprefix("\ufeff")
    if not header_line and lines.faults:
        yield from lines.faults if wanted(0) else ()
        return
    if "\0" in header_line:
        yield Fault(1, "binary", excerpt_of(header_line))
        return
    try:
        header, delimiter = _header(header_line, text_column)
    except csv.Error as error:
        yield Fault(1, "not-csv", str(error))
        return
    if text_column not in header:
        count = sum(1 for line in lines if line.strip())
        if wanted(0):
            yield Fault(1, "missing-text", excerpt_of(header_line), max(count, 1), tuple(header))
        return
    reader = csv.reader(lines, delimiter=delimiter)
    left_out = LeftOut()
    row = 0
    while limit is None or row < limit:
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if wanted(row // BLOCK_ROWS):
                yield Fault(lines.number, "not-csv", str(error))
            row += 1
            continue
        if not fields:
            continue
        if wanted(row // BLOCK_ROWS):
            if keep is None or keep(dict(zip(header, fields))):
                yield _row(lines.number, header, fields, text_column, with_columns)
            else:
                yield from left_out.add(row // BLOCK_ROWS, lines.number)
        row += 1
    yield from left_out.report()
    if wanted(row // BLOCK_ROWS):
        yield from lines.faults


def _header(line: str, text_column: str) -> tuple[list[str], str]:
    headers = {mark: next(csv.reader([line], delimiter=mark), []) for mark in (",", ";", "\t")}
    delimiter = next((mark for mark, header in headers.items() if text_column in header), ",")
    return headers[delimiter], delimiter


def _row(number: int, header: list[str], fields: list[str], text_column: str, with_columns: bool) -> Row | Fault:
    if len(fields) > len(header):
        return Fault(number, "too-many-columns", excerpt_of(", ".join(fields)))
    record = dict(zip(header, fields))
    text = record.get(text_column)
    if text is not None and not text.isascii() and not _ESCAPED.isdisjoint(text):
        return Fault(number, "invalid-utf8", excerpt_of(text.encode("utf-8", "surrogateescape")))
    columns = plain_columns(record, text_column) if with_columns else {}
    return row_or_fault(number, text, columns, tuple(header) if text is None else ())


class _Lines:
    """Decoded lines for the CSV parser, counted; what cannot be given to it is kept as `faults`."""

    def __init__(self, lines: Iterator[tuple[bytes, int]]) -> None:
        self.number = 0
        self.faults: list[Fault] = []
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            try:
                line, length = next(self._lines)
            except BrokenStream as error:
                self.faults.append(Fault(self.number + 1, error.reason))
                raise StopIteration from error
            self.number += 1
            if len(line) < length:
                self.faults.append(Fault(self.number, "line-too-long", excerpt_of(line)))
                continue
            return line.decode("utf-8", "surrogateescape") + "\n"
