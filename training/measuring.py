"""What is measured in the course of a run, after which steps, and when there is no use in going on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from config.training import TrainingConfig
from model.transformer import Transformer


class Evaluated(Protocol):
    """The result of an evaluation: at least the mean loss in nats per token, over the shares of all processes."""

    @property
    def loss(self) -> float:
        """Nats per token."""


Evaluate = Callable[[Transformer, int, int], Evaluated]  # model, rank, world size
Ask = Callable[[Transformer, int, int], float]  # the same, for the share of questions answered rightly
Sample = Callable[[Transformer], str]
Measured = dict[str, float]  # validation_loss and task_accuracy, as far as they were measured at a step


def due_at(training: TrainingConfig, step: int, last: bool, saving: bool) -> set[str]:
    """The metrics to be measured after `step`; with `saving`, also what the best checkpoint is told by."""
    wanted: set[str] = {training.best_metric} if saving and training.keep_best else set()
    if last or step % training.eval_interval == 0:
        wanted.add("validation_loss")
    if last or step % (training.task_interval or step + 1) == 0:
        wanted.add("task_accuracy")
    return wanted


class EarlyStopping:
    """Ends a run whose metric has got no better in `patience` measurements in a row; off where that is None.

    Better means by more than `min_delta` than the best so far. The simplest of the rules that are compared in Prechelt,
    1998 (https://doi.org/10.1007/3-540-49430-8_3). The state is part of checkpoints; `saved` is that of one.
    """

    def __init__(self, training: TrainingConfig, saved: dict[str, Any] | None = None) -> None:
        self.best: float | None = None
        self.in_vain = 0
        self.measured_at = 0
        self._training = training
        if saved is not None and saved["metric"] == training.best_metric:
            self.best, self.in_vain, self.measured_at = saved["best"], saved["in_vain"], saved["measured_at"]

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        patience = self._training.early_stopping.patience
        return patience is not None and self.in_vain >= patience

    def judge(self, step: int, measured: Measured) -> bool:
        """Note what was measured after `step`; returns whether that could end the run."""
        training = self._training
        value = measured.get(training.best_metric)
        if value is None or training.early_stopping.patience is None:
            return False
        gain = math.inf if self.best is None else self.best - value
        if training.best_metric == "task_accuracy" and self.best is not None:
            gain = -gain
        better = math.isfinite(value) and gain > training.early_stopping.min_delta
        self.best, self.in_vain = (value, 0) if better else (self.best, self.in_vain + 1)
        self.measured_at = step
        return True

    def owes(self, step: int) -> bool:
        """Whether a run that was stopped after `step` did so in place of a measurement that counts here."""
        training = self._training
        saving = step % training.checkpoint_interval == 0
        return (
            training.early_stopping.patience is not None
            and self.measured_at < step
            and training.best_metric in due_at(training, step, False, saving)
        )

    def state_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {
            "metric": self._training.best_metric,
            "best": self.best,
            "in_vain": self.in_vain,
            "measured_at": self.measured_at,
        }
