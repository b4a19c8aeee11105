"""What changes over a run, as pure functions of the step: nothing here remembers, so nothing need be saved.

Steps count from 1 to `steps`, the last one included.
"""

from __future__ import annotations

import math

from config.training import ScheduleConfig, ShortSequencesConfig


def rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on every learning rate at `step` of `steps`, in [0, 1].

    All three warm up linearly, step 1 having 1 / warmup_steps. Then `constant` stays at 1; `cosine` (Loshchilov and
    Hutter, 2017) falls to `final_fraction` at the last step; `wsd` (warm-up, stable, decay; Hu et al., 2024) holds 1
    until the last `decay_fraction` of the run, and falls linearly to `final_fraction` one step after the last, so that
    the last step still moves the weights.
    """
    if step < schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cosine":
        progress = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
        return schedule.final_fraction + (1.0 - schedule.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_steps = max(1, round(schedule.decay_fraction * steps))
    left = min(1.0, max(0, steps + 1 - step) / decay_steps) if schedule.decay_fraction > 0 else 1.0
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * left


def piece_length(short: ShortSequencesConfig, step: int, steps: int, sequence_length: int) -> int:
    """Tokens per sequence at `step`: `short.length` for the first `short.fraction` of the run, then all."""
    if short.length is None or step > short.fraction * steps:
        return sequence_length
    return short.length
