"""Matrices that several processes hold, dealt to them for what needs whole matrices: Muon's orthogonalisation.

The matrices of one shape are dealt in equal shares. Where each process holds a part of every matrix (sharded), the
parts travel to the owner of the matrix, and what it makes of them travels back. Where each holds all of them (data
parallel), only the results travel. Either way no process of a group does the work of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.sharding import part_of
from training.layout import Layout
from training.shares import Share

Pending = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Box:
    """Where in a matrix a part of it lies."""

    row: int
    column: int
    rows: int
    columns: int

    def of(self, matrices: Tensor) -> Tensor:
        """The view of this box in each of `matrices` (count, rows, columns)."""
        return matrices[:, self.row : self.row + self.rows, self.column : self.column + self.columns]


@dataclass(frozen=True, slots=True)
class Dealing:
    """How the processes of `group` hold matrices of `shape`: process i has the part `boxes[i]` of each.

    Of `count` matrices, process i owns those from i * share to (i + 1) * share, with the smallest share that suffices.
    """

    group: dist.ProcessGroup
    shape: tuple[int, int]
    boxes: tuple[Box, ...]

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.boxes)

    @property
    def rank(self) -> int:
        """Number of this one among them."""
        return dist.get_rank(self.group)

    @property
    def repeated(self) -> bool:
        """Whether every process holds the whole of every matrix."""
        return all((box.rows, box.columns) == self.shape for box in self.boxes)

    def share(self, count: int) -> int:
        """How many of `count` matrices a process owns, at most."""
        return -(-count // self.size)

    def to_owners(self, parts: Tensor) -> Pending:
        """Send the own parts of all matrices, (count, rows here, columns here); get those owned, whole."""
        count, share = len(parts), self.share(len(parts))
        mine = slice(self.rank * share, min(count, (self.rank + 1) * share))
        if self.repeated:
            return lambda: parts[mine]
        padded = _padded(parts, share * self.size)
        sizes = [share * box.rows * box.columns for box in self.boxes]
        received = padded.new_empty(sum(sizes))
        work = self._exchange(received, padded.flatten(), sizes, [sizes[self.rank]] * self.size)

        def wait() -> Tensor:
            work.wait()
            whole = received.new_empty(share, *self.shape)
            for box, piece in zip(self.boxes, torch.split(received, sizes), strict=True):
                box.of(whole).copy_(piece.view(share, box.rows, box.columns))
            return whole[: max(0, mine.stop - mine.start)]

        return wait

    def from_owners(self, owned: Tensor, count: int) -> Pending:
        """The way back: send what was made of the owned matrices; get the own parts of all `count` of them."""
        share = self.share(count)
        padded = _padded(owned, share)
        if self.repeated:
            gathered = padded.new_empty(share * self.size, *self.shape)
            gathering = dist.all_gather_single(gathered, padded, group=self.group, async_op=True)

            def wait() -> Tensor:
                gathering.wait()
                return gathered[:count]

            return wait
        sizes = [share * box.rows * box.columns for box in self.boxes]
        sent = torch.cat([box.of(padded).flatten() for box in self.boxes])
        received = sent.new_empty(sizes[self.rank] * self.size)
        work = self._exchange(received, sent, [sizes[self.rank]] * self.size, sizes)

        def wait_for_parts() -> Tensor:
            work.wait()
            box = self.boxes[self.rank]
            return received.view(share * self.size, box.rows, box.columns)[:count]

        return wait_for_parts

    def mean_squares(self, parts: Tensor) -> Tensor:
        """The mean square of every row of the whole matrices, (count, rows, 1), from the own parts of them."""
        squares = parts.square()
        if self.repeated:
            return squares.mean(dim=-1, keepdim=True)
        box = self.boxes[self.rank]
        sums = parts.new_zeros(len(parts), self.shape[0], 1)
        sums[:, box.row : box.row + box.rows] = squares.sum(dim=-1, keepdim=True) / self.boxes.count(box)
        dist.all_reduce(sums, group=self.group)
        return sums / self.shape[1]

    def own_rows(self, rows: Tensor) -> Tensor:
        """Of numbers for every row, (count, rows, 1), those of the own parts."""
        box = self.boxes[self.rank]
        return rows[:, box.row : box.row + box.rows]

    def _exchange(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> Any:
        return dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group, async_op=True)


def _padded(matrices: Tensor, count: int) -> Tensor:
    """`matrices` followed by zeros up to `count` of them."""
    missing = count - len(matrices)
    matrices = matrices.contiguous()
    return torch.cat([matrices, matrices.new_zeros(missing, *matrices.shape[1:])]) if missing else matrices


def deal_matrices(shares: Iterable[Share], layout: Layout) -> dict[Tensor, Dealing]:
    """For the part of every matrix, how it is dealt; nothing where there is one process. All processes must call it."""
    if layout.data_size * layout.tensor == 1:
        return {}
    group = _holders(layout)

    @cache
    def dealing(shape: tuple[int, int], boxes: tuple[Box, ...]) -> Dealing:
        return Dealing(group, shape, boxes)

    found: dict[Tensor, Dealing] = {}
    for share in shares:
        if share.whole.ndim == 2:
            rows, columns = share.whole.shape
            boxes = _boxes(share.whole, layout) if share.sharded else (Box(0, 0, rows, columns),) * layout.data_size
            found[share.part] = dealing((rows, columns), boxes)
    return found


def _holders(layout: Layout) -> dist.ProcessGroup:
    """The processes that hold one copy of the model together; where each holds one, all of them."""
    size, world_size = layout.shard * layout.tensor, dist.get_world_size()
    if size in (1, world_size):
        world: dist.ProcessGroup | None = dist.group.WORLD
        assert world is not None
        return world
    groups = [list(range(start, start + size)) for start in range(0, world_size, size)]
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration(groups)  # type: ignore[no-untyped-call]
    return own


def _boxes(whole: Any, layout: Layout) -> tuple[Box, ...]:
    """The part of the `DTensor` `whole` at each process of a copy of the model, in their order."""
    blank = torch.empty(whole.shape, device="meta")
    boxes = []
    for shard in range(layout.shard):
        for tensor in range(layout.tensor):
            at = {"replicate": 0, "shard": shard, "tensor": tensor}
            part = part_of(blank, whole, [at[axis] for axis in whole.device_mesh.mesh_dim_names])
            row, column = divmod(int(part.storage_offset()), blank.shape[1])
            boxes.append(Box(row, column, *part.shape))
    return tuple(boxes)
