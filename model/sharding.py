"""Weights that several processes hold together (`DTensor`): which part is whose, and writing it from the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a checkpoint's folder that has not been read yet."""

    folder: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


def is_shared(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`, whose type is dear to import where there is none."""
    return hasattr(tensor, "device_mesh")


def own_part(whole: Tensor, shared: Tensor) -> Tensor:
    """The view of `whole` that this process holds of the `DTensor` `shared`, which has the same shape."""
    return part_of(whole, shared, shared.device_mesh.get_coordinate())  # type: ignore[attr-defined]


def part_of(whole: Tensor, shared: Tensor, coordinate: Sequence[int]) -> Tensor:
    """The view of `whole` that the process at `coordinate` of the mesh holds of the `DTensor` `shared`.

    A dimension is cut as `torch.chunk` does. Where two dimensions of the mesh cut the same one of the tensor, tensor
    parallelism, the last of them, cut first: FSDP shards what it finds.
    """
    mesh, part = shared.device_mesh, whole  # type: ignore[attr-defined]
    for axis in reversed(range(mesh.ndim)):
        dimension: int | None = getattr(shared.placements[axis], "dim", None)  # type: ignore[attr-defined]
        if dimension is None:
            continue
        chunks, index = part.chunk(mesh.size(axis), dimension), coordinate[axis]
        part = chunks[index] if index < len(chunks) else part.narrow(dimension, 0, 0)
    return part


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy `whole` into `target`, or this process's part of it where `target` is a `DTensor`; nothing is sent."""
    if is_shared(target):
        target.to_local().copy_(own_part(whole, target))  # type: ignore[attr-defined]
    else:
        target.copy_(whole)


def fill_all(pairs: Iterable[tuple[Tensor, Tensor | Stored]]) -> None:
    """`fill` every target from a whole tensor, or from one that is still to be read."""
    pairs = list(pairs)
    stored = [(target, source) for target, source in pairs if isinstance(source, Stored)]
    if stored:
        from model.sharded_checkpoint import read_tensors

        read_tensors(stored)
    for target, source in pairs:
        if isinstance(source, Tensor):
            fill(target, source)


class RowsHeld(NamedTuple):
    """The `rows` of a matrix, from its row `first` on, that this process of `group` holds; without a group, all."""

    rows: Tensor
    first: int
    group: dist.ProcessGroup | None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the group, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def maximum_(self, tensor: Tensor) -> Tensor:
        """The largest of every element over the group, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor


def rows_held(matrix: Tensor) -> RowsHeld:
    """What this process holds of `matrix`: of a `DTensor` that is cut by rows its own, with the gradient's way back."""
    if not is_shared(matrix):
        return RowsHeld(matrix, 0, None)
    shared: Any = matrix
    (size,), rank = shared.device_mesh.shape, shared.device_mesh.get_local_rank()
    first = min(len(matrix), rank * -(-len(matrix) // size))
    return RowsHeld(shared.to_local(), first, shared.device_mesh.get_group())


def linear_whole(x: Tensor, matrix: Tensor) -> Tensor:
    """`F.linear`, all of whose result `(..., rows)` every process has, though `matrix` may be a `DTensor`."""
    if not is_shared(matrix):
        return F.linear(x, matrix)
    from torch.distributed.tensor import DTensor, Replicate

    shared: Any = matrix
    everywhere = DTensor.from_local(x, shared.device_mesh, [Replicate()], run_check=False)
    product: Any = F.linear(everywhere, matrix)
    whole: Tensor = product.full_tensor()
    return whole


def with_summed_gradient(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """`tensor`, the same in all processes of `mesh`, each of which uses it for its part: their gradients are summed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    everywhere: Any = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    local: Tensor = everywhere.to_local(grad_placements=[Partial()])
    return local


@contextmanager
def random_numbers_of_slice(number: int, device: torch.device) -> Iterator[None]:
    """Within it, processes that draw the same random numbers draw others, each by its `number`; after it, the same."""
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + number)
        yield
