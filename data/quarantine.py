"""Bad records: counted by reason, kept where a person can look at them, and too many of them are an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from config.errors import UserError
from config.files import disk_errors
from data.documents import BadRecord
from data.formats.rows import LEFT_OUT

HARMLESS = frozenset({"empty", LEFT_OUT})
"""Reasons that do not make a source bad: many good data sets hold empty rows, and some rows nobody asked for."""


class Quarantine:
    """Appends bad records to the JSON Lines file `path`, which is only made when there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: list[BadRecord] = []
        self._file: IO[bytes] | None = None

    def add(self, record: BadRecord) -> None:
        """Count and write one record. A full disk raises `UserError`."""
        import orjson

        self.counts[record.reason] += record.count
        if len(self.first) < 3 and record.reason not in HARMLESS:
            self.first.append(record)
        entry = {"location": record.location, "reason": record.reason, "count": record.count, "excerpt": record.excerpt}
        with disk_errors(self.path):
            if self._file is None:
                self._file = open(self.path, "ab")
            self._file.write(orjson.dumps(entry) + b"\n")

    def flush(self) -> int:
        """Hand what is written to the system; the length of the file in bytes."""
        if self._file is not None:
            with disk_errors(self.path):
                self._file.flush()
        return self.path.stat().st_size if self.path.exists() else 0

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is not None:
            with disk_errors(self.path):
                self._file.close()


def read_quarantine(path: Path, source: str) -> Iterator[BadRecord]:
    """The records in the quarantine file `path`; none where there is no file."""
    import orjson

    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            entry = orjson.loads(line)
            yield BadRecord(source, entry["location"], entry["reason"], entry["excerpt"], entry["count"])


def describe(counts: Mapping[str, int]) -> str:
    """Counts by reason, most frequent first: `not-json 10, empty 2`."""
    return ", ".join(
        f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def check_bad_fraction(
    source: str, documents: int, counts: Mapping[str, int], first: Sequence[BadRecord], limit: float, path: Path
) -> None:
    """Raise `UserError` if more than the fraction `limit` of all records could not be read.

    Args:
        documents: records that were good.
        counts: bad records by reason; those whose reason is `HARMLESS` do not count.
        first: a few of the bad records, to be named.
        path: the quarantine file, where the rest of them stand.
    """
    bad = {reason: count for reason, count in counts.items() if reason not in HARMLESS}
    total = documents + sum(bad.values())
    if sum(bad.values()) <= limit * total:
        return
    examples = "; ".join(f"{record.location} ({record.reason})" for record in first)
    raise UserError(
        f"Source {source!r}: {sum(bad.values())} of {total} records cannot be read ({describe(bad)}), more than "
        f"data.preprocess.max_bad_fraction={limit} allows. The first: {examples}. All of them: {path}. "
        "Mend them, or raise data.preprocess.max_bad_fraction."
    )
