"""Running tokens through a model on a cache: by kernels of our own on a CPU, and by the model itself elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inference.cpu import CPUModel
from model.cache import KVCache
from model.quantized import QuantizedLinear
from model.transformer import Transformer

BLOCK = 256  # tokens of one sequence that are run at once: as a large matrix product
SMALL = 16_000_000  # parameters: the products of a smaller model are over before another thread has woken
_EXTENT_STEP = 64  # attention looks at the cache in multiples of this many positions


class Chunk(NamedTuple):
    """Tokens that continue a row of the cache at position `start`; at most `BLOCK`.

    The logits after the last `wanted` of them are asked for: after one, or after all of fewer than `BLOCK`.
    """

    row: int
    start: int
    tokens: Sequence[int]
    wanted: int = 1


class Runner(Protocol):
    """Runs chunks, at most one for each row; the logits `(all that are wanted, vocab_size)` come back in their order.

    They have no gradients, and may be overwritten by the next call. `token_cost` is what a further token adds to the
    time of a step, as a share of that of a step over one token; infinite for a runner that gives the logits after the
    last token only.
    """

    token_cost: float

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See the class."""


def make_runner(model: Transformer, cache: KVCache, compiled: bool = False) -> Runner:
    """The fastest runner that can run `model`; a `compiled` one where that is asked for."""
    if compiled:
        from inference.compiled import CompiledRunner

        return CompiledRunner(model, cache)
    return CPURunner(model, cache) if CPUModel.takes(model) else ModelRunner(model, cache)


def token_cost(model: Transformer) -> float:
    """What `Runner` wants to know, of the kernels on a CPU, as measured (benchmarks/RESULTS.md, decoding).

    Reading the weights takes most of a step, but not where they stay in the cache, and less of it with fewer bits.
    """
    if model.num_parameters() < SMALL:
        return 0.5
    return 0.3 if any(isinstance(part, QuantizedLinear) for part in model.modules()) else 0.1


class CPURunner:
    """What a row gets is the same, to the last bit, whatever else is run with it and however it is cut below `BLOCK`.

    A chunk of `BLOCK` tokens goes by itself through the model's own large products, and all others together through the
    kernels that are made for few tokens.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._kernels, self._lengths = CPUModel(model, cache), cache.lengths.numpy()
        self.token_cost = token_cost(model)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner`."""
        small = [chunk for chunk in chunks if len(chunk.tokens) < BLOCK]
        few = self._run_small(small) if small else None
        if few is not None and len(small) == len(chunks):
            return few
        parts = iter(() if few is None else torch.split(few, [chunk.wanted for chunk in small]))
        return torch.cat([next(parts) if len(chunk.tokens) < BLOCK else self._run_block(chunk) for chunk in chunks])

    def _run_small(self, chunks: Sequence[Chunk]) -> Tensor:
        tokens = [token for chunk in chunks for token in chunk.tokens]
        rows = [chunk.row for chunk in chunks for _ in chunk.tokens]
        positions = [chunk.start + place for chunk in chunks for place in range(len(chunk.tokens))]
        wanted: list[int] = []
        end = -1
        for chunk in chunks:
            end += len(chunk.tokens)
            wanted += range(end - chunk.wanted + 1, end + 1)
            self._lengths[chunk.row] = chunk.start + len(chunk.tokens)
        return self._kernels.run(tokens, rows, positions, wanted)

    def _run_block(self, chunk: Chunk) -> Tensor:
        return run_rows(self._model, self._cache, [chunk]).float()


class ModelRunner:
    """Runs the model itself; products of another size may differ in their last bits."""

    token_cost = 0.3  # of PyTorch's products on a CPU; on a GPU it may be less

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner`."""
        logits: dict[int, Tensor] = {}
        for group in self._groups(chunks):
            together = [chunks[place] for place in group]
            found = run_rows(self._model, self._cache, together)
            logits |= zip(group, torch.split(found, [chunk.wanted for chunk in together]))
        return torch.cat([logits[place] for place in range(len(chunks))])

    def _groups(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Places in `chunks` of those that one forward pass may run."""
        groups: list[list[int]] = []
        for place in sorted(range(len(chunks)), key=lambda place: chunks[place].row):
            if groups and self._alike([chunks[other] for other in (*groups[-1], place)]):
                groups[-1].append(place)
            else:
                groups.append([place])
        return groups

    def _alike(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these are neighbouring rows, and either all of them empty, or no more is run than is wanted."""
        neighbours = chunks[-1].row - chunks[0].row == len(chunks) - 1
        reach = max(chunk.start for chunk in chunks) + max(len(chunk.tokens) for chunk in chunks)
        decoded = all(chunk.wanted == len(chunk.tokens) for chunk in chunks) and reach <= self._cache.max_length
        return neighbours and (decoded or all(chunk.start == 0 for chunk in chunks))


@torch.inference_mode()
def run_rows(model: Transformer, cache: KVCache, chunks: Sequence[Chunk]) -> Tensor:
    """One forward pass over neighbouring rows, padded on the right: logits `(all that are wanted, vocab_size)`."""
    device = cache.lengths.device
    longest = max(len(chunk.tokens) for chunk in chunks)
    padded = [[*chunk.tokens, *[0] * (longest - len(chunk.tokens))] for chunk in chunks]
    counts = torch.tensor([len(chunk.tokens) for chunk in chunks], device=device)
    starts = torch.tensor([chunk.start for chunk in chunks], device=device)
    rows = cache.rows(chunks[0].row, chunks[-1].row + 1)
    rows.set_lengths(starts)
    reach = max(chunk.start for chunk in chunks) + longest
    rows.extent = min(rows.max_length, -(-reach // _EXTENT_STEP) * _EXTENT_STEP)
    tokens = torch.tensor(padded, device=device)
    if all(chunk.wanted == 1 for chunk in chunks):
        logits = model.next_logits(tokens, rows, counts - 1)
    else:
        every = model(tokens, cache=rows)
        ends = [(row, len(chunk.tokens), chunk.wanted) for row, chunk in enumerate(chunks)]
        logits = torch.cat([every[row, end - wanted : end] for row, end, wanted in ends])
    rows.set_lengths(starts + counts)
    return logits
