"""The numbers of a run, worked out once from the configuration, the data's size and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from config.errors import UserError
from config.model import ModelConfig
from config.schema import Config
from config.section import divisors
from config.training import BatchWarmupConfig, TrainingConfig
from training.layout import Layout, make_layout
from training.schedules import batch_rows, sequences_through


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows` are the samples of one process in a step, seen in equal forward passes of at most `micro_rows`.

    A sample is one sequence, or `sample_rows` of them, as where two answers are compared.
    """

    layout: Layout
    steps: int
    batch_size: int
    batch_warmup: BatchWarmupConfig
    sequence_length: int
    rows: int
    micro_rows: int
    sample_rows: int = 1

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step, over all processes, once the batch has grown."""
        return self.batch_size * self.sample_rows * self.sequence_length

    def tokens_of(self, step: int) -> int:
        """Input tokens of `step`, which are fewer while the batch grows."""
        return batch_rows(self.batch_warmup, step, self.batch_size) * self.sample_rows * self.sequence_length

    def tokens_through(self, step: int) -> int:
        """Input tokens of the steps up to `step`, that one included."""
        return self.sequences_through(step) * self.sample_rows * self.sequence_length

    def sequences_through(self, step: int) -> int:
        """Sequences of the steps up to `step`, that one included."""
        return sequences_through(self.batch_warmup, step, self.batch_size)

    def sizes_after(self, step: int) -> Iterator[int]:
        """Sequences of each step after `step`, without end."""
        return (batch_rows(self.batch_warmup, at, self.batch_size) for at in count(step + 1))

    def micro_rows_of(self, rows: int) -> int:
        """Sequences of one forward pass, where a process has `rows` of them in a step."""
        return max(size for size in divisors(rows) if size <= self.micro_rows)


def sequence_length(model: ModelConfig, training: TrainingConfig) -> int:
    """Tokens per training sequence."""
    return training.sequence_length or model.context_length


def make_plan(
    config: Config, samples: int, world_size: int, examples_per_sample: float = 1.0, sample_rows: int = 1
) -> Plan:
    """Plan a run over `samples` samples per epoch on `world_size` processes.

    `training.batch_size` counts examples; where a sample holds several, a step has so many samples as hold as many.

    A micro-batch holds at most `training.micro_batch_size` rows; where that does not divide a process's rows, the next
    smaller size that does is taken, so that every forward pass has the same shape.
    """
    training = config.training
    layout = make_layout(config, world_size)
    shares = layout.data_size
    batch_size = max(1, round(training.batch_size / examples_per_sample))
    if batch_size != training.batch_size and batch_size % shares:
        enough = round(math.ceil(batch_size / shares) * shares * examples_per_sample)
        raise UserError(
            f"training.batch_size={training.batch_size} examples fill {batch_size} packed samples, which cannot be "
            f"dealt evenly to {shares} processes. Set training.batch_size={enough}, or data.finetuning.packing=false."
        )
    sizes = {"batch_size": batch_size, "batch_warmup.sequences": training.batch_warmup.sequences or shares}
    for key, size in sizes.items():
        if size % shares:
            raise UserError(
                f"training.{key}={size} cannot be dealt evenly to {shares} processes; choose a multiple of {shares}."
            )
    rows = batch_size // shares
    steps = training.max_steps
    if steps is None:
        assert training.epochs is not None
        missing = training.batch_warmup.steps * batch_size
        missing -= sequences_through(training.batch_warmup, training.batch_warmup.steps, batch_size)
        steps = max(1, round((training.epochs * samples + missing) / batch_size))
    return Plan(
        layout=layout,
        steps=steps,
        batch_size=batch_size,
        batch_warmup=training.batch_warmup,
        sequence_length=sequence_length(config.model, training),
        rows=rows,
        micro_rows=rows if training.micro_batch_size == "auto" else training.micro_batch_size,
        sample_rows=sample_rows,
    )
