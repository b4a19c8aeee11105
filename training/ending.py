"""What a person reads where a run ends before its last step, or had reached it before."""

from __future__ import annotations

import signal

from training.trainer import TrainResult


def told_end(result: TrainResult, resume: str, longer: str) -> bool:
    """Print how the run ended, and what to type, unless it took its last step now: then False, and nothing is printed.

    `resume` is the command that goes on from the checkpoint, `longer` what to add to it to train on past the last step.
    """
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
