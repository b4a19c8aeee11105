"""What is measured while training, without waiting for the device between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.distributed import Process
from training.throughput import wait_for


class Reading(NamedTuple):
    """The steps since the last reading. `loss` is in nats per trained token, None if no step of them counted.

    `gradient_norm` is that of the last one, NaN where none had a gradient. `seconds_per_step` is of all
    steps so far, with what was done between them, but for those before the first reading, which may have waited for a
    compiler.
    """

    loss: float | None
    gradient_norm: float
    tokens_per_second: float
    mfu: float
    seconds_per_step: float


@dataclass
class Meter:
    """Sums of losses and tokens kept on the device, and the time spent in training alone.

    `peak_flops` is what one device reaches in its own matrix product: model FLOPs utilisation is relative to it.
    """

    process: Process
    peak_flops: float

    def __post_init__(self) -> None:
        self._totals = torch.zeros(2, dtype=torch.float32, device=self.process.device)
        self._wall, self._taken, self._readings = 0.0, 0, 0
        self._begin()

    def _begin(self) -> None:
        self._totals.zero_()
        self._norm = torch.full((), torch.nan, device=self.process.device)
        self._started, self._aside = time.perf_counter(), 0.0
        self._steps = self._tokens = 0
        self._flops = 0.0

    def add(self, input_tokens: int, flops_per_token: float) -> None:
        """Count a step over `input_tokens` tokens of all processes."""
        self._steps += 1
        self._tokens += input_tokens
        self._flops += flops_per_token * input_tokens

    def add_loss(self, loss_sum: Tensor, valid: int, gradient_norm: Tensor, skipped: Tensor) -> None:
        """Count an update: this process's summed loss, a float32 scalar, and the trained tokens of all processes."""
        self._norm = gradient_norm
        kept = torch.stack([loss_sum, torch.full_like(loss_sum, valid)])
        self._totals += torch.where(skipped, torch.zeros_like(kept), kept)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside is not training; what the device has still to do of the steps before it is."""
        wait_for(self.process.device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - started

    def read(self) -> Reading:
        """Wait for the device, and report on the steps since the last reading. Every process must call it."""
        losses = self.process.sum_(self._totals[:1].clone())
        summed, valid, norm = torch.cat([losses, self._totals[1:], self._norm.float()[None]]).tolist()
        wall = time.perf_counter() - self._started
        seconds = max(wall - self._aside, 1e-9)
        if self._readings == 1:
            self._wall, self._taken = 0.0, 0
        self._wall, self._taken, self._readings = self._wall + wall, self._taken + self._steps, self._readings + 1
        reading = Reading(
            loss=summed / valid if valid else None,
            gradient_norm=norm,
            tokens_per_second=self._tokens / seconds,
            mfu=self._flops / seconds / (self.peak_flops * self.process.world_size),
            seconds_per_step=self._wall / max(1, self._taken),
        )
        self._begin()
        return reading
