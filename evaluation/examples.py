"""How well a model says what the examples of fine-tuning teach: the loss of their trained tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.perplexity import IGNORED, Evaluation, summarize


class Samples(Protocol):
    """Numbered samples, such as `data.examples.samples.ExampleSamples`."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each `(time,)`, integers; targets hold -100 where nothing is scored."""
        ...


@torch.no_grad()
def evaluate_samples(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int,
    device: torch.device | str,
    token_bytes: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], object] = torch.distributed.all_reduce,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Score every target of every sample; the loss is their sum over their count, whatever the batch and world size.

    Arguments and result are those of `evaluate_tokens`, where a block is one sample. Columns in which no sample of a
    batch scores anything any more are not computed.
    """
    device = torch.device(device)
    precise = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(len(samples), 4, dtype=precise, device=device)
    sizes = None if token_bytes is None else torch.from_numpy(np.ascontiguousarray(token_bytes)).to(device)

    was_training = model.training
    model.eval()
    try:
        # As many for every process: a sharded model is run by all or none. A number past the end is not scored.
        mine = np.arange(rank, len(samples) + -len(samples) % world_size, world_size)
        for begin in range(0, len(mine), batch_size):
            batch = mine[begin : begin + batch_size]
            numbers = batch[batch < len(samples)]
            inputs, targets = (part.to(device) for part in batch_of(samples, batch.clip(max=len(samples) - 1)))
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = model(inputs)
            losses = nn.functional.cross_entropy(
                logits.transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
            ).to(precise)
            scored = targets != IGNORED
            size = sizes[targets.clamp(min=0)] * scored if sizes is not None else torch.zeros_like(targets)
            rows = [losses, scored, losses * (size > 0), size]
            figures = torch.stack([row.sum(1, dtype=precise) for row in rows], dim=1)
            sums[torch.from_numpy(numbers).to(device)] = figures[: len(numbers)]
    finally:
        model.train(was_training)
    if world_size > 1:
        all_reduce(sums)
    return summarize(sums.cpu().double().numpy())


def batch_of(samples: Samples, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and targets `(batch, time)` int64, as long as the last target of the batch needs."""
    pairs: list[Any] = [samples.sample(int(number)) for number in numbers]
    inputs, targets = (np.stack([pair[part] for pair in pairs]).astype(np.int64) for part in (0, 1))
    length = int(np.flatnonzero((targets != IGNORED).any(axis=0))[-1]) + 1
    return torch.from_numpy(inputs[:, :length].copy()), torch.from_numpy(targets[:, :length].copy())
