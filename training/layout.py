"""How the processes of a run share a model: copies of it, shards of a copy, and slices of every matrix."""

from __future__ import annotations

import os
from dataclasses import dataclass

from config.errors import UserError
from config.model import ModelConfig
from config.schema import Config


@dataclass(frozen=True, slots=True)
class Layout:
    """`replicate` copies of the model, each dealt to `shard` processes, each of which is `tensor` that slice matrices.

    Processes are numbered with `tensor` running fastest, then `shard`, so that those who talk most are neighbours on
    one machine. The processes that slice the same matrices see the same rows of data.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data_size(self) -> int:
        """Into how many shares the rows of a batch are dealt."""
        return self.replicate * self.shard

    @property
    def shares_weights(self) -> bool:
        """Whether no process holds the whole model."""
        return self.shard > 1 or self.tensor > 1


def make_layout(config: Config, world_size: int) -> Layout:
    """The layout that `training.parallelism`, `shard_group` and `tensor_parallel` ask of `world_size` processes.

    A shard group of `hsdp` spans, by default, the processes of one machine. Raises `UserError` where the numbers do not
    divide, and where `fsdp` is given a group.
    """
    training = config.training
    if world_size == 1:
        return Layout()
    tensor = training.tensor_parallel
    if world_size % tensor:
        raise UserError(
            f"training.tensor_parallel={tensor} does not divide the {world_size} processes of this run. "
            "Start a multiple of it."
        )
    _check_slices(config.model, tensor)
    data = world_size // tensor
    if training.parallelism == "ddp":
        return Layout(replicate=data, tensor=tensor)
    if training.parallelism == "fsdp":
        if training.shard_group is not None:
            raise UserError(
                "training.shard_group is of training.parallelism=hsdp; fsdp deals the model to all GPUs. Set "
                "training.shard_group=null, or choose hsdp."
            )
        return Layout(shard=data, tensor=tensor)
    shard = training.shard_group or max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) // tensor)
    if data % shard:
        raise UserError(
            f"training.shard_group={shard} does not divide the {data} shares of the data that {world_size} processes "
            "make. Choose a divisor of it."
        )
    return Layout(replicate=data // shard, shard=shard, tensor=tensor)


def _check_slices(model: ModelConfig, tensor: int) -> None:
    for key, size in (("n_heads", model.n_heads), ("n_kv_heads", model.kv_heads), ("d_ff", model.feed_forward_dim)):
        if size % tensor:
            raise UserError(f"training.tensor_parallel={tensor} does not divide model.{key}={size}. Choose a divisor.")
