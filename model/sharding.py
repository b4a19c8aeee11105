"""Weights that several processes hold together (`DTensor`): which part is whose, and writing it from the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


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
