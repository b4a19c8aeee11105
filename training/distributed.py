"""One process or many: who am I, which device is mine, and what the processes tell one another.

The processes of a run are started by torchrun, which says in the environment who is who. A run of one process is the
case where nobody else is there: every function here then does nothing or returns its argument.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from config.errors import UserError
from model.devices import choose_device

LOST_CONTACT = ("closed by peer", "reset by peer", "Broken pipe")


@dataclass(frozen=True, slots=True)
class Process:
    """This process among the `world_size` of the run. Numbers on the host travel by gloo, so no GPU is waited for.

    `tensor` neighbours work on the same rows of data, each on its slice of the matrices: they count as one.
    """

    rank: int
    world_size: int
    device: torch.device
    tensor: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the rows of a batch is this process's, of `data_size`."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """Into how many shares the rows of a batch are dealt."""
        return self.world_size // self.tensor

    def total(self, number: int) -> int:
        """The sum of `number` over all shares of the data."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(tensor)
        return int(tensor) // self.tensor

    def largest(self, number: int) -> int:
        """The largest `number` of all processes."""
        return self.largest_each(number)[0]

    def largest_each(self, *numbers: int) -> list[int]:
        """The same of several at once, each for itself."""
        if self.world_size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [int(number) for number in tensor]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a floating-point tensor on the device over all shares of the data, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.div_(self.tensor) if self.tensor > 1 else tensor

    def fail_together(self, error: UserError | None) -> None:
        """Return if no process has an error; else the first that has raises its own, and the others end in silence."""
        first = self.world_size - self.largest(0 if error is None else self.world_size - self.rank)
        if first == self.rank and error is not None:
            raise error
        if first < self.world_size:
            raise SystemExit(1)


@contextmanager
def open_process(device: str, tensor: int = 1) -> Iterator[Process]:
    """Join the group that torchrun's environment describes, if it does, and leave it at the end.

    `tensor` neighbours slice the same matrices. `device` is `auto`, `cpu`, `cuda` or `mps`. Raises `UserError` where
    the machine lacks it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if world_size == 1:
        yield Process(0, 1, chosen)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(rank, world_size, chosen, tensor)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_CONTACT):
            raise
        print(f"process {rank} stops: another process of the run has ended", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        dist.destroy_process_group()
