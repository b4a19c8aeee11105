"""The numbers of a run, worked out once from the configuration, the data's size and the number of processes."""

from __future__ import annotations

from dataclasses import dataclass

from config.errors import UserError
from config.model import ModelConfig
from config.schema import Config
from config.section import divisors
from config.training import TrainingConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """`rows` are the sequences of one process in a step, seen in `micro_batches` equal forward passes."""

    steps: int
    batch_size: int
    sequence_length: int
    rows: int
    micro_batches: int

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step, over all processes."""
        return self.batch_size * self.sequence_length


def sequence_length(model: ModelConfig, training: TrainingConfig) -> int:
    """Tokens per training sequence."""
    return training.sequence_length or model.context_length


def make_plan(config: Config, samples: int, world_size: int) -> Plan:
    """Plan a run over `samples` sequences per epoch on `world_size` processes.

    A micro-batch holds at most `training.micro_batch_size` rows; where that does not divide a process's rows, the next
    smaller size that does is taken, so that every forward pass has the same shape.
    """
    training = config.training
    if training.batch_size % world_size:
        raise UserError(
            f"training.batch_size={training.batch_size} cannot be dealt evenly to {world_size} processes; "
            f"choose a multiple of {world_size}."
        )
    rows = training.batch_size // world_size
    steps = training.max_steps
    if steps is None:
        assert training.epochs is not None
        steps = max(1, round(training.epochs * samples / training.batch_size))
    return Plan(
        steps=steps,
        batch_size=training.batch_size,
        sequence_length=sequence_length(config.model, training),
        rows=rows,
        micro_batches=min(count for count in divisors(rows) if rows // count <= training.micro_batch_size),
    )
