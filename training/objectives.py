"""What a step learns: the next token, or which of two answers is preferred. The loop around them is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from config.training import DPOConfig
from data.data_loader import IGNORED, Batch
from model.preferences import first_tokens, pair_margins, preference_loss
from model.transformer import Transformer
from training import randomness
from training.distributed import Process
from training.parallelism import aside

LOSS_BEFORE = math.log(2.0)  # DPO's of any pair, where the model has not left its starting weights
References = Callable[[Transformer, int, int], dict[str, Any]]  # model, rank, world size


class Objective(Protocol):
    """`measures` are the attributes of an evaluation's result that are recorded beside its loss."""

    measures: tuple[str, ...]

    def begin(self, model: Transformer, process: Process) -> None:
        """Before the first step of a run, or of its going on. All processes call it together."""

    def count(self, batch: Batch) -> int:
        """What the losses of this process's share of a batch, on the host, are to be divided by in the end."""

    def loss(self, forward: nn.Module, part: Batch) -> Tensor:
        """The summed loss of a micro-batch on the device, a float32 scalar."""


class NextToken:
    """Cross-entropy of every target that is not masked."""

    measures: tuple[str, ...] = ()

    def begin(self, model: Transformer, process: Process) -> None:
        """Nothing is needed."""

    def count(self, batch: Batch) -> int:
        """The targets."""
        return int((batch.targets != IGNORED).sum())

    def loss(self, forward: nn.Module, part: Batch) -> Tensor:
        """Their cross-entropy."""
        loss: Tensor = forward(part.inputs, part.targets, documents=part.documents)
        return loss


class DirectPreference:
    """DPO on the samples of `data.examples.pairs.PairSamples`, held against the weights that the run began with.

    How these judge each pair is computed once, by `references`, and kept in `about`, which every checkpoint holds, so a
    run that goes on is held against the very same numbers: under "reference", "train" and "validation" are the margins
    log p(chosen) - log p(rejected) of the pairs, `(pairs,)` float32.
    """

    measures: tuple[str, ...] = ("reward_accuracy", "reward_margin")

    def __init__(self, settings: DPOConfig, about: dict[str, Any], references: References) -> None:
        self._settings = settings
        self._about = about
        self._references = references
        self._margins = torch.empty(0)

    def begin(self, model: Transformer, process: Process) -> None:
        """Compute the reference, or take it up again."""
        if "reference" not in self._about:
            with randomness.undisturbed(), aside(model):
                self._about["reference"] = self._references(model, process.data_rank, process.data_size)
        self._margins = self._about["reference"]["train"].to(process.device, copy=True)

    def count(self, batch: Batch) -> int:
        """The pairs, each of which is in both halves of a sample."""
        assert batch.documents is not None
        return int(first_tokens(batch.documents[:, : batch.documents.shape[1] // 2]).sum())

    def loss(self, forward: nn.Module, part: Batch) -> Tensor:
        """Their losses."""
        assert part.documents is not None
        losses = forward(part.inputs, part.targets, documents=part.documents, each=True)
        margins = pair_margins(losses, part.documents)
        reference = self._margins[margins.numbers.clamp(min=0)]
        each = preference_loss(margins.values, reference, self._settings.beta, self._settings.label_smoothing)
        return torch.where(margins.first, each, 0.0).sum()
