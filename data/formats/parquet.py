"""Parquet: row groups are the units that workers share, read in batches small enough for memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.formats.rows import Fault, Keep, LeftOut, Row, Wanted, plain_columns, row_or_fault

BATCH_BYTES = 16 << 20
BUFFER_BYTES = 1 << 20
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


def read_parquet(
    file: IO[bytes], text_column: str, wanted: Wanted, limit: int | None, with_columns: bool, keep: Keep | None
) -> Iterator[Row | Fault]:
    """One row per row of the file, numbered from 0."""
    try:
        content = pq.ParquetFile(file, buffer_size=BUFFER_BYTES)
    except UNREADABLE as error:
        if wanted(0):
            yield Fault(0, "corrupt", str(error).splitlines()[0])
        return
    schema = content.schema_arrow
    columns = [text_column, *_plain(schema, text_column)] if with_columns else [text_column]
    if keep is not None and keep.root in schema.names and keep.root not in columns:
        columns.append(keep.root)
    first = 0
    for group in range(content.num_row_groups):
        size = content.metadata.row_group(group).num_rows
        if limit is not None:
            size = min(size, limit - first)
        if size > 0 and wanted(group):
            if text_column in schema.names:
                yield from _read_group(content, group, first, size, columns, keep)
            else:
                yield Fault(first, "missing-text", "", size, tuple(schema.names))
        first += size


def count_parquet_rows(file: IO[bytes]) -> int:
    """Rows that the footer states; 1 for a file that cannot be opened, which is read as one fault."""
    try:
        return int(pq.read_metadata(file).num_rows)
    except UNREADABLE:
        return 1


def _read_group(
    content: Any, group: int, first: int, size: int, columns: list[str], keep: Keep | None
) -> Iterator[Row | Fault]:
    metadata = content.metadata.row_group(group)
    left_out = LeftOut()
    there = tuple(content.schema_arrow.names)
    rows = max(1, min(1000, BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)))
    number = first
    try:
        for batch in content.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
            batch = batch.slice(0, first + size - number)
            for place, row in enumerate(_read_batch(batch, number, columns, keep, there), number):
                if row is not None:
                    yield row
                else:
                    yield from left_out.add(group, place)
            number += batch.num_rows
            if number >= first + size:
                break
    except UNREADABLE as error:
        yield Fault(number, "corrupt", str(error).splitlines()[0], first + size - number)
    yield from left_out.report()


def _read_batch(
    batch: Any, number: int, columns: list[str], keep: Keep | None, there: tuple[str, ...]
) -> Iterator[Row | Fault | None]:
    """One item per row: None where `keep` leaves it out. `there` are all columns of the file."""
    values = {name: _values(batch.column(batch.schema.get_field_index(name))) for name in columns}
    texts = values[columns[0]]
    for offset, text in enumerate(texts):
        if keep is not None and not keep({name: values[name][offset] for name in columns}):
            yield None
            continue
        if isinstance(text, bytes):
            yield Fault(number + offset, "invalid-utf8", text[:200].decode("utf-8", "backslashreplace"))
            continue
        record = {name: values[name][offset] for name in columns[1:]}
        yield row_or_fault(
            number + offset, text, plain_columns(record, columns[0]), () if isinstance(text, str) else there
        )


def _values(column: Any) -> list[Any]:
    """A column as Python objects, where a text that is not UTF-8 stays bytes."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return [_decode(value) for value in column.to_pylist()]
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _plain(schema: Any, text_column: str) -> list[str]:
    """Other columns whose values are strings, numbers or truth values."""
    return [
        field.name
        for field in schema
        if field.name != text_column
        and (
            pa.types.is_string(field.type)
            or pa.types.is_large_string(field.type)
            or pa.types.is_integer(field.type)
            or pa.types.is_floating(field.type)
            or pa.types.is_boolean(field.type)
        )
    ]
