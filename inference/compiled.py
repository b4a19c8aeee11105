"""Prefill and decoding as two compiled steps of fixed shapes, for GPUs, where launching many small kernels takes most
of the time of a token: torch.compile makes few of them, and CUDA graphs launch them all at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from inference.runners import BLOCK, Chunk, run_rows
from model.cache import KVCache
from model.transformer import Transformer


class CompiledRunner:
    """A `Runner`. Single tokens of all rows go through one graph; longer chunks, padded to `BLOCK`, through another.

    `backend` is one of torch.compile's. Chunks too near to the end of the cache for the padding run uncompiled. There
    is no graph for a few tokens of a row, so none are guessed.
    """

    token_cost = math.inf

    def __init__(self, model: Transformer, cache: KVCache, backend: str = "inductor") -> None:
        config, device = model.config, cache.keys.device
        mode = "reduce-overhead" if backend == "inductor" and device.type == "cuda" else None
        self._model, self._cache = model, cache
        self._alone = KVCache(config, 1, cache.max_length, device, cache.keys.dtype)
        self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self._lengths = [0] * cache.batch_size
        self._decode = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend, mode=mode)
        self._prefill = torch.compile(model.next_logits, fullgraph=True, dynamic=False, backend=backend)
        for tensor in (cache.keys, cache.values, cache.lengths, self._tokens):
            torch._dynamo.mark_static_address(tensor)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner`."""
        for chunk in chunks:
            self._lengths[chunk.row] = chunk.start
        single = [chunk for chunk in chunks if len(chunk.tokens) == 1]
        decoded = self._run_single(single) if single else None
        for chunk in chunks:
            self._lengths[chunk.row] = chunk.start + len(chunk.tokens)
        if decoded is not None and len(single) == len(chunks):
            return decoded[[chunk.row for chunk in chunks]]
        return torch.stack(
            [
                decoded[chunk.row] if decoded is not None and len(chunk.tokens) == 1 else self._run_block(chunk)
                for chunk in chunks
            ]
        )

    def _run_single(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits `(rows, vocab_size)` of all rows; those of rows that are not due mean nothing."""
        # A row that is not due gets a token past its end, or in the last place, which no other text can begin with.
        tokens = [0] * len(self._lengths)
        for chunk in chunks:
            tokens[chunk.row] = chunk.tokens[0]
        self._cache.set_lengths([min(length, self._cache.max_length - 1) for length in self._lengths])
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        cast(Any, torch.compiler).cudagraph_mark_step_begin()
        logits: Tensor = self._decode(self._tokens, cache=self._cache)
        return logits[:, -1]

    def _run_block(self, chunk: Chunk) -> Tensor:
        count, alone, cache = len(chunk.tokens), self._alone, self._cache
        if chunk.start + BLOCK > cache.max_length:
            return run_rows(self._model, cache, [chunk])[0]
        device, row, end = cache.keys.device, chunk.row, chunk.start + count
        for own, whole in ((alone.keys, cache.keys), (alone.values, cache.values)):
            own[:, 0, :, : chunk.start] = whole[:, row, :, : chunk.start]
        alone.set_lengths([chunk.start])
        padded = torch.tensor([[*chunk.tokens, *[0] * (BLOCK - count)]], device=device)
        logits: Tensor = self._prefill(padded, alone, torch.tensor([count - 1], device=device))
        for own, whole in ((alone.keys, cache.keys), (alone.values, cache.values)):
            whole[:, row, :, chunk.start : end] = own[:, 0, :, chunk.start : end]
        return logits[0].clone()
