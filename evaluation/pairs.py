"""How well a model tells the preferred answers of held-out pairs from the rejected ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config.training import DPOConfig
from data.examples.samples import ExampleSamples
from evaluation.examples import Samples, batch_of
from evaluation.perplexity import default_batch_size
from evaluation.run_report import read_run
from model.preferences import preference_loss
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class PairEvaluation:
    """`loss` is that of DPO, in nats per pair.

    A reward is beta times the log-ratio of the model's probability of an answer to that under the starting weights.
    `reward_margin` is the mean reward of the chosen answer less that of the rejected one; `reward_accuracy` the share
    of pairs where it is above zero.
    """

    loss: float
    reward_accuracy: float
    reward_margin: float


@torch.no_grad()
def measure_margins(
    model: nn.Module,
    sides: Samples,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], object] = torch.distributed.all_reduce,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """log p(chosen) - log p(rejected) of every pair in nats, `(pairs,)` float32 on the host.

    `sides` are the chosen and the rejected side of each pair in turn, of which the trained tokens count. The batches,
    of `batch_size` sides, are the same whatever the number of processes, which share them out: so every figure is the
    same to the last bit, too. `model` is evaluated without dropout, and left in the mode it was in.
    """
    device = torch.device(device)
    precise = torch.float32 if device.type == "mps" else torch.float64
    found = torch.zeros(
        2, len(sides), dtype=precise, device=device
    )  # log-probabilities, and how often each was measured
    batches = np.array_split(np.arange(len(sides)), range(batch_size, len(sides), batch_size))
    was_training = model.training
    model.eval()
    try:
        # As many for every process: a sharded model is run by all or none. What is past the end is not counted.
        for number in range(rank, len(batches) + -len(batches) % world_size, world_size):
            numbers = batches[min(number, len(batches) - 1)]
            inputs, targets = (part.to(device) for part in batch_of(sides, numbers))
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                losses = model(inputs, targets, each=True)
            if number < len(batches):
                found[0, numbers], found[1, numbers] = -losses.sum(1, dtype=precise), 1.0
    finally:
        model.train(was_training)
    if world_size > 1:
        all_reduce(found)
    chosen, rejected = (found[0] / found[1]).view(-1, 2).unbind(1)
    return (chosen - rejected).cpu().float()


def evaluate_margins(margins: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> PairEvaluation:
    """The figures of pairs whose margins are `margins`, and were `reference` with the starting weights."""
    rewards = beta * (margins - reference).double()
    losses = preference_loss(margins.double(), reference.double(), beta, label_smoothing)
    return PairEvaluation(float(losses.mean()), float((rewards > 0).double().mean()), float(rewards.mean()))


@dataclass(frozen=True, slots=True)
class PairJudge:
    """Measures pairs to train on and to validate on, given as their sides; see `measure_margins`.

    `about` is where "reference" is found, the margins with the starting weights, once `references` has made them.
    `autocast` tells the dtype of matrix products on a device.
    """

    train: ExampleSamples
    validation: ExampleSamples
    settings: DPOConfig
    about: dict[str, Any]
    autocast: Callable[[torch.device], torch.dtype | None]

    def references(self, model: Transformer, rank: int, world_size: int) -> dict[str, Any]:
        """The margins of all pairs as `model` judges them, and the fingerprint of those to validate on."""
        return {
            "train": self._margins(self.train, model, rank, world_size),
            "validation": self._margins(self.validation, model, rank, world_size),
            "validation_fingerprint": self.validation.fingerprint,
        }

    def evaluate(self, model: Transformer, rank: int, world_size: int) -> PairEvaluation:
        """The figures of all held-out pairs."""
        margins, settings = self._margins(self.validation, model, rank, world_size), self.settings
        reference = self.about["reference"]["validation"]
        return evaluate_margins(margins, reference, settings.beta, settings.label_smoothing)

    def _margins(self, sides: ExampleSamples, model: Transformer, rank: int, world_size: int) -> Tensor:
        device = model.output_weight.device
        return measure_margins(
            model,
            sides,
            batch_size=default_batch_size(sides.length, model.config.padded_vocab_size, device),
            device=device,
            rank=rank,
            world_size=world_size,
            autocast=self.autocast(device),
        )


def learnt_of_pairs(run_dir: Path, pairs: int, before: float, after: float) -> str:
    """What a run has learnt, from its folder and the DPO loss of its held-out `pairs`, in a line."""
    run = read_run(run_dir)
    return (
        f"DPO loss on {pairs:,} held-out pairs: {before:.4f} before, {after:.4f} after. In "
        f"{run.last('reward_accuracy'):.1%} of them the chosen answer has gained on the rejected one (reward margin "
        f"{run.last('reward_margin'):.3f})."
    )
