"""The columns of a set under the names that examples have: `--map prompt=question --map completion=answer.text`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.load import nearest
from data.examples.checks import Unusable

KEYS = ("text", "prompt", "completion", "messages", "chosen", "rejected")


class Columns:
    """Which column stands for which key of an example; `a.b` is the field b of the column a.

    It remembers which columns it has met, to tell a wrong name from a gap in the rows.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = list(words)
        self._columns: dict[str, str] = {}
        self._there: dict[str, None] = {}
        self._found: set[str] = set()
        for word in words:
            key, equals, column = word.partition("=")
            if not equals or not column:
                raise UserError(f"--map {word}: write KEY=COLUMN, such as --map prompt=question.")
            if key not in KEYS:
                raise UserError(f"--map {word}: examples have no key {key!r}.{nearest(key, KEYS)}")
            if key in self._columns:
                raise UserError(f"--map {word}: {key} is {self._columns[key]} already.")
            self._columns[key] = column

    @property
    def needed(self) -> set[str]:
        """The columns of a table that have to be read."""
        return {*KEYS, *self._columns.values(), *(column.partition(".")[0] for column in self._columns.values())}

    def meet(self, names: Iterable[str]) -> None:
        """Take note of the columns of a table, read or not."""
        self._there.update(dict.fromkeys(names))

    def rename(self, record: dict[str, Any]) -> dict[str, Any]:
        """`record` with what is asked for under its key. Raises `Unusable` where that is not in it."""
        if not self._columns:
            return record
        self.meet(record)
        found = {}
        for key, column in self._columns.items():
            if (value := self._value(record, column)) is None:
                raise Unusable(f'has no "{column}"')
            self._found.add(column)
            found[key] = value
        taken = self._columns.values()
        return {**{key: value for key, value in record.items() if key not in taken}, **found}

    def _value(self, record: Mapping[str, Any], column: str) -> Any:
        value: Any = record
        for key in [column] if column in record else column.split("."):
            value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, dict):
                self.meet(f"{key}.{name}" for name in value)
        return value

    def refuse_unknown(self, path: Path) -> None:
        """Raise `UserError` for a column that no row of `path` had."""
        for key, column in self._columns.items():
            if column not in self._found and self._there:
                raise UserError(
                    f"No row of {path} has the column {column!r} of --map {key}={column}."
                    f"{nearest(column, self._there)}"
                )
