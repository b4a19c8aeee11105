"""Where a sample comes from, in words: for a person who wants to see what a run stumbled over."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data.permutation import permute
from data.tokens import INDEX_DTYPE, SOURCE_DTYPE, TokenFile, TokenFiles


@runtime_checkable
class Placed(Protocol):
    """A source of samples that knows where each of them lies."""

    def place(self, index: int) -> str:
        """File and position of a sample."""


def places(source: Any, positions: range, seed: int) -> list[str]:
    """Where the samples of `source` (a `SampleSource`) at `positions` of the endless order of `seed` lie."""
    found = []
    for position in positions:
        epoch, within = divmod(position, len(source))
        index = permute(within, len(source), seed, epoch)
        found.append(source.place(index) if isinstance(source, Placed) else f"sample {index}")
    return found


def place_of_tokens(tokens: TokenFiles, start: int, count: int) -> str:
    """Where `count` tokens from `start` on lie: file, position in it, documents of it, and the sources of those."""
    starts = list(accumulate((file.tokens for file in tokens.files), initial=0))
    found = []
    for number in range(bisect_right(starts, start) - 1, len(tokens.files)):
        first, end = max(start - starts[number], 0), min(start + count, starts[number + 1]) - starts[number]
        if first >= end:
            break
        file = tokens.files[number]
        ends = np.memmap(tokens.directory / file.index_name, INDEX_DTYPE, "r")
        documents = np.searchsorted(ends, np.array([first, end - 1], dtype=INDEX_DTYPE), side="right").tolist()
        one = documents[0] == documents[1]
        which = f"document {documents[0]}" if one else f"documents {documents[0]} to {documents[1]}"
        sources = _sources(tokens, file, slice(documents[0], documents[1] + 1))
        which += f" of {' and '.join(sources)}" if sources else ""
        found.append(f"{tokens.directory / file.name} tokens {first} to {end - 1} ({which})")
    return ", ".join(found)


def _sources(tokens: TokenFiles, file: TokenFile, documents: slice) -> list[str]:
    """Those of some documents of `file`, as far as they are known, in the order of the manifest."""
    names = list(tokens.manifest.sources)
    if file.sources_sha256 is None:
        return names if len(names) == 1 else []
    numbers = np.memmap(tokens.directory / file.sources_name, SOURCE_DTYPE, "r")[documents]
    return [names[number] for number in np.unique(numbers)]
