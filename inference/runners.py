"""Running tokens through a model on a cache: by kernels of our own on a CPU, and by the model itself elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inference.cpu import CPUModel
from model.cache import KVCache
from model.transformer import Transformer

BLOCK = 256  # tokens of one sequence that are run at once: as a large matrix product
_EXTENT_STEP = 64  # attention looks at the cache in multiples of this many positions


class Chunk(NamedTuple):
    """Tokens that continue a row of the cache at position `start`; at most `BLOCK`."""

    row: int
    start: int
    tokens: Sequence[int]


class Runner(Protocol):
    """Runs chunks, at most one for each row; the logits `(chunks, vocab_size)` after the last token of each come back.

    They may be overwritten by the next call.
    """

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See the class."""


def make_runner(model: Transformer, cache: KVCache, compiled: bool = False) -> Runner:
    """The fastest runner that can run `model`; a `compiled` one where that is asked for."""
    if compiled:
        from inference.compiled import CompiledRunner

        return CompiledRunner(model, cache)
    return CPURunner(model, cache) if CPUModel.takes(model) else ModelRunner(model, cache)


class CPURunner:
    """What a row gets is the same, to the last bit, whatever else is run with it and however it is cut below `BLOCK`.

    A chunk of `BLOCK` tokens goes by itself through the model's own large products, and all others together through the
    kernels that are made for few tokens.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._kernels, self._lengths = CPUModel(model, cache), cache.lengths.numpy()

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner`."""
        small = [chunk for chunk in chunks if len(chunk.tokens) < BLOCK]
        few = self._run_small(small) if small else None
        if few is not None and len(small) == len(chunks):
            return few
        places = iter(range(len(small)))
        parts = [
            few[next(places)] if few is not None and len(chunk.tokens) < BLOCK else self._run_block(chunk)
            for chunk in chunks
        ]
        return torch.stack(parts)

    def _run_small(self, chunks: Sequence[Chunk]) -> Tensor:
        tokens = [token for chunk in chunks for token in chunk.tokens]
        rows = [chunk.row for chunk in chunks for _ in chunk.tokens]
        positions = [chunk.start + place for chunk in chunks for place in range(len(chunk.tokens))]
        ends, end = [], -1
        for chunk in chunks:
            end += len(chunk.tokens)
            ends.append(end)
            self._lengths[chunk.row] = chunk.start + len(chunk.tokens)
        return self._kernels.run(tokens, rows, positions, ends)

    def _run_block(self, chunk: Chunk) -> Tensor:
        return run_rows(self._model, self._cache, [chunk])[0].float()


class ModelRunner:
    """Runs the model itself; products of another size may differ in their last bits."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner`."""
        logits: list[Tensor | None] = [None] * len(chunks)
        for group in _runs(chunks):
            for place, row in zip(group, run_rows(self._model, self._cache, [chunks[i] for i in group]), strict=True):
                logits[place] = row
        return torch.stack([row for row in logits if row is not None])


def _runs(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Places in `chunks` of those that one forward pass may run: neighbouring rows, all empty or all of one token."""
    groups: list[list[int]] = []
    for place in sorted(range(len(chunks)), key=lambda place: chunks[place].row):
        chunk = chunks[place]
        if groups:
            before = chunks[groups[-1][-1]]
            alike = chunk.start == before.start == 0 or len(chunk.tokens) == len(before.tokens) == 1
            if alike and chunk.row == before.row + 1:
                groups[-1].append(place)
                continue
        groups.append([place])
    return groups


def run_rows(model: Transformer, cache: KVCache, chunks: Sequence[Chunk]) -> Tensor:
    """One forward pass over neighbouring rows, padded on the right: logits `(chunks, vocab_size)`."""
    device = cache.lengths.device
    longest = max(len(chunk.tokens) for chunk in chunks)
    padded = [[*chunk.tokens, *[0] * (longest - len(chunk.tokens))] for chunk in chunks]
    counts = torch.tensor([len(chunk.tokens) for chunk in chunks], device=device)
    starts = torch.tensor([chunk.start for chunk in chunks], device=device)
    rows = cache.rows(chunks[0].row, chunks[-1].row + 1)
    rows.set_lengths(starts)
    reach = max(chunk.start for chunk in chunks) + longest
    rows.extent = min(rows.max_length, -(-reach // _EXTENT_STEP) * _EXTENT_STEP)
    logits = model.next_logits(torch.tensor(padded, device=device), rows, counts - 1)
    rows.set_lengths(starts + counts)
    return logits
