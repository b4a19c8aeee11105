"""What a person reads at the end of a run: how it ended, and which of its checkpoints is the one to use."""

from __future__ import annotations

import signal
from pathlib import Path

from training.trainer import TrainResult


def told_end(result: TrainResult, resume: str, longer: str) -> bool:
    """Print how the run ended, and what to type, unless it took its last step now: then False, and nothing is printed.

    `resume` is the command that goes on from the checkpoint, `longer` what to add to it to train on past the last step.
    """
    if result.already_complete and result.in_vain:
        print(f"This run is complete: it was stopped early after step {result.step:,} of {result.steps:,}.")
        print(f"Nothing was done. To train on: {resume} training.early_stopping.patience=null")
        return True
    if result.already_complete:
        print(f"This run is complete: step {result.step:,} of {result.steps:,}. Nothing was done.")
        print(f"To train on: {resume} {longer}")
        return True
    if result.stopped_by is None:
        return False
    cause = signal.Signals(result.stopped_by).name if result.stopped_by else "training.max_hours"
    if result.checkpoint is None:
        print(f"Stopped by {cause} before the first step.")
        return True
    print(f"Stopped by {cause} after step {result.step:,} of {result.steps:,}; wrote {result.checkpoint}.")
    print(f"Go on with: {resume}")
    return True


def told_best(result: TrainResult) -> Path | None:
    """The checkpoint to use: the best one. Prints why, where it is not the last, or the run was stopped early."""
    best = result.best
    if result.in_vain:
        print(
            f"Stopped early after step {result.step:,} of {result.steps:,}: the last {result.in_vain} evaluations were "
            "no better than the best before them (training.early_stopping)."
        )
    if best is None or best.path == result.checkpoint:
        return result.checkpoint
    print(
        f"The best checkpoint is {best.path}: {best.metric.replace('_', ' ')} {best.value:.4f} at step {best.step:,}."
    )
    return best.path
