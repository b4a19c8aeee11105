"""JSON Lines: one object per line, as .jsonl, .jsonl.gz, .jsonl.zst, .json.gz or .json.zst."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

import orjson

from data.formats.rows import BLOCK_ROWS, Fault, Keep, LeftOut, Row, Wanted, excerpt_of, plain_columns, row_or_fault
from data.formats.streams import BrokenStream, bounded_lines, text_chunks


def read_jsonl(
    file: IO[bytes],
    path: str,
    text_column: str,
    wanted: Wanted,
    limit: int | None,
    with_columns: bool,
    keep: Keep | None,
) -> Iterator[Row | Fault]:
    """One row per line that is not blank; lines that are not wanted are not parsed."""
    left_out = LeftOut()
    row = 0
    number = 0
    lines = bounded_lines(text_chunks(file, path))
    while limit is None or row < limit:
        try:
            line, length = next(lines)
        except StopIteration:
            break
        except BrokenStream as error:
            if wanted(row // BLOCK_ROWS):
                yield Fault(number + 1, error.reason)
            break
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        if wanted(row // BLOCK_ROWS):
            if len(line) < length and number > 1 or len(line) < length - len(codecs.BOM_UTF8):
                yield Fault(number, "line-too-long", excerpt_of(line))
            else:
                found = _parse(number, line, text_column, with_columns, keep)
                if found is not None:
                    yield found
                else:
                    yield from left_out.add(row // BLOCK_ROWS, number)
        row += 1
    yield from left_out.report()


def numbered_lines(file: IO[bytes], path: str) -> Iterator[tuple[int, bytes | None]]:
    """Number, from 1, and content of every line that is not blank; None for one too long to be held in memory.

    Raises `BrokenStream` at the end of a file that cannot be decompressed to its end.
    """
    for number, (line, length) in enumerate(bounded_lines(text_chunks(file, path)), start=1):
        whole = len(line) == length
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield number, line if whole else None


def count_lines(file: IO[bytes], path: str, cut: bool) -> int:
    """Lines that are not blank, of a file that is `cut` only those that are whole for certain; nothing is parsed."""
    rows = 0
    try:
        for line, _ in bounded_lines(text_chunks(file, path)):
            rows += bool(line.strip())
    except BrokenStream:
        return rows if cut else rows + 1  # the fault that reading ends with is a record, too
    return max(rows - cut, 0)


def _parse(number: int, line: bytes, text_column: str, with_columns: bool, keep: Keep | None) -> Row | Fault | None:
    """The row of a line, or why there is none, or None where `keep` leaves it out."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _lenient(line)
        if isinstance(record, str):
            return Fault(number, record, excerpt_of(line))
    if not isinstance(record, dict):
        return Fault(number, "not-an-object", excerpt_of(line))
    if keep is not None and not keep(record):
        return None
    columns = plain_columns(record, text_column) if with_columns else {}
    text = record.get(text_column)
    return row_or_fault(number, text, columns, () if isinstance(text, str) else tuple(record))


def _lenient(line: bytes) -> dict[str, Any] | list[Any] | str:
    """What orjson refuses and Python's own parser takes, such as NaN or half a surrogate pair; else a reason."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid-utf8"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return "not-json"
    return record if isinstance(record, dict) else []
