"""Merging the sorted files that the tasks of a stage wrote, however many they are."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

MOST_OPEN = 256  # files at once; a thousand is a common limit of a process


def merged_lines(parts: Sequence[Path], key: Callable[[bytes], Any], most_open: int = MOST_OPEN) -> Iterator[bytes]:
    """The lines of all files, each of which is sorted by `key`, in that order."""
    with tempfile.TemporaryDirectory(prefix="quern-merge-") as name:
        files, made = list(parts), 0
        while len(files) > most_open:
            group, files = files[:most_open], files[most_open:]
            target = Path(name) / str(made)
            with target.open("wb") as output:
                output.writelines(_merge(group, key))
            files.append(target)
            made += 1
        yield from _merge(files, key)


def _merge(parts: Sequence[Path], key: Callable[[bytes], Any]) -> Iterator[bytes]:
    with ExitStack() as stack:
        yield from heapq.merge(*[stack.enter_context(part.open("rb")) for part in parts], key=key)
