"""Bad records of all tasks, brought into one quarantine file whose order does not depend on the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import orjson

from config.files import atomic_write
from data.documents import BadRecord
from data.pipeline.merging import merged_lines
from data.quarantine import HARMLESS


def write_quarantine(path: Path, use: Sequence[str], bad: Sequence[BadRecord]) -> None:
    """Write bad records as JSON lines, by source in the order of `use`, then location; no file if there is none."""
    if not bad:
        return
    lines = [
        {
            "order": use.index(record.source),
            "source": record.source,
            "location": record.location,
            "reason": record.reason,
            "count": record.count,
            "excerpt": record.excerpt,
        }
        for record in bad
    ]
    lines.sort(key=lambda line: (line["order"], line["location"], line["reason"]))
    with atomic_write(path) as file:
        for line in lines:
            file.write(orjson.dumps(line) + b"\n")


def merge_quarantine(parts: Sequence[Path], path: Path) -> None:
    """Merge the sorted files of all tasks into one, record by record; no file where nothing was bad."""

    def key(line: bytes) -> tuple[int, str, str, bytes]:
        entry = orjson.loads(line)
        return entry["order"], entry["location"], entry["reason"], line

    found = [part for part in parts if part.exists()]
    if not found:
        return
    with atomic_write(path) as file:
        for line in merged_lines(found, key):
            entry = orjson.loads(line)
            del entry["order"]
            file.write(orjson.dumps(entry) + b"\n")


def first_harmful(path: Path, source: str, count: int) -> list[BadRecord]:
    """The first `count` records of `source` in the merged file that make a source bad."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        records = (BadRecord(**orjson.loads(line)) for line in file)
        wanted = (record for record in records if record.source == source and record.reason not in HARMLESS)
        return list(islice(wanted, count))
