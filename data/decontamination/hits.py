"""The list of what was found: one file whose order does not depend on the tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import orjson

from config.files import atomic_write
from data.decontamination.documents import Hit
from data.pipeline.merging import merged_lines


def write_hits(path: Path, hits: Sequence[Hit]) -> None:
    """Write the hits of one task as JSON lines, sorted; an empty file where there are none."""
    with atomic_write(path) as file:
        for hit in sorted(hits):
            file.write(orjson.dumps(list(hit)) + b"\n")


def merge_hits(parts: Sequence[Path], use: Sequence[str], path: Path) -> dict[str, int]:
    """Merge the files of all tasks into one for people; how many documents each set was found in.

    No file is written where nothing was found.
    """
    counts: Counter[str] = Counter()
    if not any(part.stat().st_size for part in parts):
        return {}
    with atomic_write(path) as file:
        for line in merged_lines(parts, orjson.loads):
            source, key, name, ngram = orjson.loads(line)
            counts[name] += 1
            file.write(orjson.dumps({"source": use[source], "id": key, "set": name, "ngram": ngram}) + b"\n")
    return dict(sorted(counts.items()))
