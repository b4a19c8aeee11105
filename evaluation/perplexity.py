"""How well a model predicts held-out text: loss, perplexity and bits per byte, with confidence intervals.

The text is read through windows of `context_length` tokens, `stride` apart. A window scores only the targets that no
earlier window scored, so every token but the very first is scored exactly once, and all but those of the first window
have at least `context_length - stride` tokens of context. Which tokens are scored does not depend on the batch size or
on the number of processes.

What is kept of the losses are sums per block (per document where the documents are known). They add up over processes,
give the bootstrap its blocks, and a later reader the loss of every document or source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.bootstrap import ratio_interval

IGNORED = -100


class TokenReader(Protocol):
    """A long row of tokens that is read in parts: `data.tokens.TokenFiles` is one, `ArrayTokens` another."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` as integers."""
        ...


class ArrayTokens:
    """Tokens in memory or in a memory map."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count`."""
        return self._tokens[start : start + count]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation. `loss` is in nats per token; an interval is (low, high) at 95 %, None where unknown.

    Bits per byte count only tokens that stand for text: end-of-text and its like have no bytes, and their loss is left
    out, so that the figure compares across tokenizers.

    `block_sums` is what all of it is made from, `(blocks, 4)` float64, and what evaluations of two models on the same
    blocks are compared by: loss in nats, scored tokens, loss of those tokens that stand for bytes, bytes.
    """

    loss: float
    loss_interval: tuple[float, float] | None
    tokens: int
    bits_per_byte: float | None
    bits_per_byte_interval: tuple[float, float] | None
    bytes: int | None
    block_sums: np.ndarray = field(repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return _exp(self.loss)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """The exponentials of the loss's interval."""
        return self.loss_interval and (_exp(self.loss_interval[0]), _exp(self.loss_interval[1]))

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "loss": self.loss,
            "loss_interval": self.loss_interval,
            "perplexity": self.perplexity,
            "perplexity_interval": self.perplexity_interval,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_interval": self.bits_per_byte_interval,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@torch.no_grad()
def evaluate_tokens(
    model: nn.Module,
    tokens: TokenReader | np.ndarray,
    *,
    context_length: int,
    stride: int,
    batch_size: int,
    device: torch.device | str,
    token_bytes: np.ndarray | None = None,
    block_ends: np.ndarray | None = None,
    document_ends: np.ndarray | None = None,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], object] = torch.distributed.all_reduce,
    autocast: torch.dtype | None = None,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every token of `tokens` but the first (of the first `max_tokens` targets, where that is given).

    `model(inputs)` maps `(batch, time)` int64 to logits `(batch, time, vocab)`; it is evaluated without dropout and
    left in the mode it was in. `token_bytes` is `(vocab,)`, the UTF-8 bytes each token stands for. `block_ends` holds
    the ascending end offsets of the blocks (documents); without it a block is `context_length` targets. With
    `document_ends`, likewise, no token sees one of another document, as in training with masked documents: the model
    is then called as `model(inputs, documents=...)`. `autocast` is the dtype of the matrix products. `advance` is told
    the number of targets after every batch.

    With `world_size` above 1 the process `rank` takes the windows `rank`, `rank + world_size` and so on; `all_reduce`
    adds its sums to those of the others, in place, and every process gets the figures of the whole.

    Raises ValueError for fewer than two tokens, or a stride that would skip some.
    """
    reader: TokenReader = ArrayTokens(tokens) if isinstance(tokens, np.ndarray) else tokens
    targets = len(reader) - 1 if max_tokens is None else min(len(reader) - 1, max_tokens)
    if targets < 1:
        raise ValueError("an evaluation needs at least two tokens: one to read and one to predict")
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must lie between 1 and context_length={context_length}, not {stride}")
    if block_ends is None:
        block_ends = np.arange(context_length, targets + 1 + context_length, context_length) + 1
    blocks = int(np.searchsorted(block_ends, targets, side="right")) + 1

    device = torch.device(device)
    precise = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(blocks, 4, dtype=precise, device=device)
    sizes = None if token_bytes is None else torch.from_numpy(np.ascontiguousarray(token_bytes)).to(device)

    was_training = model.training
    model.eval()
    try:
        windows = _windows(targets, context_length, stride, rank, world_size)
        for last, inputs, wanted, block in _batches(reader, block_ends, windows, context_length, batch_size):
            scored_now = int((wanted != IGNORED).sum())
            inputs, wanted, block = (part.to(device, non_blocking=True) for part in (inputs, wanted, block))
            masking = {} if document_ends is None else {"documents": _documents(document_ends, last, inputs)}
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = model(inputs, **masking)[:, -wanted.shape[1] :]
            flat, scored = wanted.flatten(), wanted.flatten() != IGNORED
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), flat, ignore_index=IGNORED, reduction="none"
            ).to(precise)
            size = sizes[flat.clamp(min=0)] * scored if sizes is not None else torch.zeros_like(flat)
            rows = torch.stack([losses, scored.to(precise), losses * (size > 0), size.to(precise)], dim=1)
            sums.index_add_(0, block.flatten(), rows)
            if advance is not None:
                advance(scored_now)
    finally:
        model.train(was_training)
    if world_size > 1:
        all_reduce(sums)
    return summarize(sums.cpu().double().numpy())


def summarize(block_sums: np.ndarray) -> Evaluation:
    """The figures from the sums of every block, `(blocks, 4)` float64 as in `Evaluation.block_sums`."""
    loss, tokens, _, size = block_sums.sum(axis=0)
    text_bits = block_sums[:, 2] / math.log(2)
    return Evaluation(
        loss=float(loss / tokens),
        loss_interval=ratio_interval(block_sums[:, 0], block_sums[:, 1]),
        tokens=int(tokens),
        bits_per_byte=float(text_bits.sum() / size) if size else None,
        bits_per_byte_interval=ratio_interval(text_bits, block_sums[:, 3]) if size else None,
        bytes=int(size) if size else None,
        block_sums=block_sums,
    )


def default_batch_size(context_length: int, vocab_size: int, device: torch.device | str = "cpu") -> int:
    """Windows per batch, by the size of their logits in float32: 16 MiB on a CPU, half a gibibyte on a GPU.

    Larger blocks of memory are given back to the system after every batch on a CPU; a third of the time went there.
    """
    elements = 2**22 if torch.device(device).type == "cpu" else 2**27
    return max(1, min(64, elements // (context_length * vocab_size)))


def _windows(targets: int, context_length: int, stride: int, rank: int, world_size: int) -> np.ndarray:
    """`(windows, 2)`: the last target of each window of `rank`, and how many of its last targets it scores.

    Every process gets as many, the last of them scoring nothing where they do not come out even: a sharded model is run
    by all its processes or none.
    """
    first = min(context_length, targets)
    ends = np.append(np.arange(first, targets, stride), targets)
    windows = np.stack([ends, np.diff(ends, prepend=0)], axis=1)
    even = np.zeros((-len(windows) % world_size, 2), dtype=windows.dtype)
    even[:, 0] = targets
    return np.concatenate([windows, even])[rank::world_size]


def _batches(
    reader: TokenReader, block_ends: np.ndarray, windows: np.ndarray, context_length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """The last target of every window, its inputs `(batch, time)`, and of the last columns that any window scores:
    targets, and the block each lies in."""
    for begin in range(0, len(windows), batch_size):
        part = windows[begin : begin + batch_size]
        width = max(1, int(part[:, 1].max()))
        length = min(context_length, int(part[0, 0]))
        rows = np.stack([reader.read(int(end) - length, length + 1) for end, _ in part]).astype(np.int64)
        positions = part[:, :1] - np.arange(width - 1, -1, -1)
        unscored = positions <= part[:, :1] - part[:, 1:]
        targets = np.where(unscored, IGNORED, rows[:, -width:])
        block = np.searchsorted(block_ends, positions, side="right")
        block[unscored] = 0
        yield part[:, 0], torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets), torch.from_numpy(block)


def _documents(ends: np.ndarray, last: np.ndarray, inputs: Tensor) -> Tensor:
    """The number of the document that each of `inputs` `(batch, time)` belongs to, int32 like it on its device."""
    positions = last[:, None] - np.arange(inputs.shape[1], 0, -1)
    numbers = np.searchsorted(ends, positions.astype(ends.dtype), side="right")
    return torch.from_numpy(numbers.astype(np.int32)).to(inputs.device, non_blocking=True)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
