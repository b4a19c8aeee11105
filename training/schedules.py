"""What changes over a run, as pure functions of the step: nothing here remembers, so nothing need be saved.

Steps count from 1 to `steps`, the last one included.
"""

from __future__ import annotations

import math

from config.training import BatchWarmupConfig, ScheduleConfig, ShortSequencesConfig


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


def batch_rows(warmup: BatchWarmupConfig, step: int, batch_size: int) -> int:
    """Sequences of `step`, over all processes: a multiple of `warmup.sequences`, from it up to `batch_size`.

    The noise of a small batch does little harm while the loss still falls fast (McCandlish et al., 2018;
    Merrill et al., 2025, https://arxiv.org/abs/2505.23971), and it costs less. Stages, rather than a new size at every
    step, keep the shapes few that a compiled step is compiled for.
    """
    if warmup.sequences is None or step > warmup.steps:
        return batch_size
    stages = batch_size // warmup.sequences
    return warmup.sequences * (1 + (step - 1) * (stages - 1) // warmup.steps)


def sequences_through(warmup: BatchWarmupConfig, step: int, batch_size: int) -> int:
    """Sequences of the steps up to `step`, that one included: where a run stands in the order of its data."""
    if warmup.sequences is None:
        return step * batch_size
    growing = min(step, warmup.steps)
    stages = max(1, batch_size // warmup.sequences - 1)
    begun = [-(-stage * warmup.steps // stages) for stage in range(stages)]  # steps before each stage
    return (step - growing) * batch_size + warmup.sequences * sum(max(0, growing - before) for before in begun)
