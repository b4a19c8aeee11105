"""Steps that would do harm: gradients that are not finite, or far larger than usual, move nothing and are counted.

A gradient is far larger than usual where its norm passes `training.spike_factor` times the median of the last `WINDOW`
norms that were not. The median, unlike a mean, is not moved by the outliers themselves. Judging happens on the device,
which nobody waits for; what came of it is read when a step is logged. The norms are part of the checkpoint, so a
resumed run judges as one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config.errors import UserError

WINDOW = 128  # norms remembered
SETTLED = 32  # norms before the first may be called an outlier
SPIKE = "spike"
NAMED = 3  # samples in an error message

PlacesOf = Callable[[range], list[str]]


class Skipped(NamedTuple):
    """A step that was left out, the norm of its gradient, and its samples: `first` up to `end` in the data's order."""

    step: int
    norm: float
    first: int
    end: int

    @property
    def samples(self) -> range:
        """Positions of the samples of its batch in the order of the data."""
        return range(self.first, self.end)

    @property
    def reason(self) -> str:
        """Why, in a word for the record."""
        return SPIKE if math.isfinite(self.norm) else "not finite"


class SpikeGuard:
    """Judges every step. All processes of a run see the same norms, so they judge alike.

    `in_a_row` are the steps left out since the last one that was not, or, once they are too many, since that one on.
    """

    def __init__(self, factor: float | None, most: int, device: torch.device) -> None:
        self.in_a_row: list[Skipped] = []
        self._factor = factor or math.inf
        self._most = most
        self._places = torch.arange(WINDOW, device=device)
        self._norms = torch.full((WINDOW,), torch.nan, device=device)
        self._taken = torch.zeros((), dtype=torch.int64, device=device)
        self._unread: list[tuple[int, range, Tensor, Tensor]] = []

    def judge(self, norm: Tensor, step: int, samples: range) -> Tensor:
        """Whether to leave out a step, from the norm of its gradient: a 0-D bool tensor, like `norm` on the device."""
        norm = norm.detach().float()
        outlier = (self._taken >= SETTLED) & (norm > self._factor * self._norms.nanmedian())
        skip = outlier | ~torch.isfinite(norm)
        self._norms = torch.where((self._places == self._taken % WINDOW) & ~skip, norm, self._norms)
        self._taken = self._taken + ~skip
        self._unread.append((step, samples, norm, skip))
        return skip

    def read(self) -> list[Skipped]:
        """Wait for the device; the steps left out since the last reading."""
        if not self._unread:
            return []
        norms = torch.stack([norm for _, _, norm, _ in self._unread]).tolist()
        skips = torch.stack([skip for _, _, _, skip in self._unread]).tolist()
        found = []
        for (step, samples, _, _), norm, skip in zip(self._unread, norms, skips, strict=True):
            if skip:
                found.append(Skipped(step, norm, samples.start, samples.stop))
                self.in_a_row.append(found[-1])
            elif len(self.in_a_row) < self._most:
                self.in_a_row.clear()
        self._unread.clear()
        return found

    def lost(self, places_of: PlacesOf, record: str) -> UserError | None:
        """The error that ends the run where too many steps in a row were left out; `record` is the file of them all."""
        if len(self.in_a_row) < self._most:
            return None
        spikes = sum(skipped.reason == SPIKE for skipped in self.in_a_row)
        what = "not been finite"
        if spikes:
            either = "" if spikes == len(self.in_a_row) else "not been finite or "
            what = f"{either}been more than {self._factor:g} times as large as usual"
        first = self.in_a_row[0]
        named, more = places_of(first.samples[:NAMED]), len(first.samples) - NAMED
        others = f" and {more} more" if more > 0 else ""
        return UserError(
            f"The gradient has {what} since step {first.step}: the run has diverged, or its data is broken. The batch "
            f"of that step: {'; '.join(named)}{others}; all that were left out stand in {record}. Look at their "
            "documents, or resume an earlier checkpoint with a lower training.adamw.learning_rate or "
            "training.muon.learning_rate."
        )

    def state_dict(self) -> dict[str, Any]:
        """As tensors and plain values, for a checkpoint; `read` comes before it."""
        norms = torch.where(self._places < self._taken, self._norms, 0.0)
        return {"norms": norms, "taken": self._taken, "in_a_row": [tuple(each) for each in self.in_a_row]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._taken = state["taken"].to(self._taken.device, copy=True)
        self._norms = torch.where(self._places < self._taken, state["norms"].to(self._norms.device), torch.nan)
        self.in_a_row = [Skipped(*each) for each in state["in_a_row"]]
