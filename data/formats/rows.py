"""What every format is read into: a row with text, or a fault that says why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

RECORD_BYTES = 32 << 20
"""Longest single record that is read, in bytes; a longer one is a fault, so that memory stays bounded."""
BLOCK_ROWS = 1000
"""Rows of a line-based file that are dealt to workers together."""
EXCERPT = 200
"""Characters of a faulty record that are kept."""

LEFT_OUT = "left-out"
"""The reason of rows that are readable and not asked for."""

Wanted = Callable[[int], bool]
"""Which units of a file to read: row groups of Parquet, blocks of `BLOCK_ROWS` rows of everything else."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text. `number` counts from 1 for lines, as editors do, and from 0 for rows of Parquet, as its tools do."""

    number: int
    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    """The other columns, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A record without usable text: a short slug as `reason`, and the beginning of the record."""

    number: int
    reason: str
    excerpt: str = ""
    count: int = 1
    """Rows that this fault stands for."""
    columns: tuple[str, ...] = ()
    """Columns that are there, where the text column is missing or holds no text."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Which rows to read: those whose `column`, `a.b` being the field b of the column a, has one of the `values`."""

    column: str
    values: frozenset[str]

    @property
    def root(self) -> str:
        """The column that the field is in."""
        return self.column.partition(".")[0]

    def __call__(self, record: dict[str, Any]) -> bool:
        """Whether to keep `record`."""
        value: Any = record
        for key in [self.column] if self.column in record else self.column.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value is not None and str(value) in self.values


class LeftOut:
    """Rows that a `Keep` leaves out, reported as one fault for each unit of the file."""

    def __init__(self) -> None:
        self._unit = -1
        self._first = 0
        self._count = 0

    def add(self, unit: int, number: int) -> Iterator[Fault]:
        """Count the row `number`; gives the report on an earlier unit when that is complete."""
        if unit != self._unit:
            yield from self.report()
            self._unit, self._first = unit, number
        self._count += 1

    def report(self) -> Iterator[Fault]:
        """The report on the rows so far, if there are any."""
        if self._count:
            yield Fault(self._first, LEFT_OUT, "", self._count)
        self._count = 0


def excerpt_of(data: bytes | str) -> str:
    """The beginning of `data` as text that can be written anywhere; what is not UTF-8 is escaped."""
    if isinstance(data, str):
        data = data[:EXCERPT].encode("utf-8", "backslashreplace")
    return data[:EXCERPT].decode("utf-8", "backslashreplace")


def is_end(row: object) -> bool:
    """Whether `row` only says that its file ends too early."""
    return isinstance(row, Fault) and row.reason == "truncated"


def text_fault(text: str) -> str | None:
    """Why `text` cannot be a document, as a slug, or None: `empty`, `lone-surrogate` or `binary`.

    Binary is what has NUL or replacement characters among more than 10 % of unprintable ones; single ones are left to
    the cleaning.
    """
    if not text or text.isspace():
        return "empty"
    if _has_lone_surrogate(text):
        return "lone-surrogate"
    if "\0" in text or "\ufffd" in text:
        odd = sum(text.count(character) for character in _UNPRINTABLE)
        if odd > len(text) / 10:
            return "binary"
    return None


_UNPRINTABLE = "".join(chr(code) for code in range(32) if chr(code) not in "\t\n\r\f") + "\x7f\ufffd"


def row_or_fault(number: int, text: Any, columns: dict[str, Any], there: tuple[str, ...]) -> Row | Fault:
    """The row for one parsed record, whose text column holds `text`; `there` are all its columns, if that is none."""
    if text is None:
        return Fault(number, "missing-text", columns=there)
    if not isinstance(text, str):
        return Fault(number, "text-not-a-string", excerpt_of(repr(text)), columns=there)
    reason = text_fault(text)
    return Fault(number, reason, excerpt_of(text)) if reason else Row(number, text, columns)


def plain_columns(record: dict[str, Any], text_column: str) -> dict[str, Any]:
    """The columns beside the text that are worth keeping: short strings, numbers and truth values, fit for JSON."""
    return {key: value for key, value in record.items() if key != text_column and _plain(key) and _plain(value)}


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) < 1000 and not _has_lone_surrogate(value)
    return isinstance(value, bool | float) or isinstance(value, int) and abs(value) < 1 << 63


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
