"""What the optimizers see of a model: of every parameter the part that this process holds, as a plain tensor.

An optimizer that works element by element does the same to a part as to the whole, so it need not know of sharding.
Where nothing is sharded, the parts are the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.sharding import Stored, fill_all, is_shared, own_part


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """`part` is this process's part of the parameter `whole`, in the same memory; one thing where not sharded."""

    name: str
    whole: nn.Parameter
    part: nn.Parameter

    @property
    def sharded(self) -> bool:
        """Whether other processes hold other parts."""
        return self.part is not self.whole

    def as_whole(self, tensor: Tensor) -> Tensor:
        """A tensor of this part's shape as the part of a `DTensor` of the whole one's shape."""
        from torch.distributed.tensor import DTensor

        like: Any = self.whole
        return DTensor.from_local(
            tensor,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def as_part(self, tensor: Tensor) -> Tensor:
        """A copy of this process's part of a tensor of the whole one's shape."""
        return own_part(tensor, self.whole).clone(memory_format=torch.contiguous_format)


def shares_of(model: nn.Module) -> list[Share]:
    """Of every parameter of `model` that is trained, what this process holds."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return [Share(name, whole, _part(whole)) for name, whole in trained]


def _part(whole: nn.Parameter) -> nn.Parameter:
    if not is_shared(whole):
        return whole
    local: Any = whole.detach()
    return nn.Parameter(local.to_local())


def take_gradients(shares: Iterable[Share]) -> None:
    """Give each part its part of the gradient that the backward pass has left at the whole."""
    for share in shares:
        if share.sharded:
            gradient: Any = share.whole.grad
            share.part.grad = None if gradient is None else gradient.to_local()


def drop_gradients(shares: Iterable[Share]) -> None:
    """Free every gradient."""
    for share in shares:
        share.whole.grad = share.part.grad = None


def gradient_norm(shares: Iterable[Share]) -> Tensor:
    """The Euclidean norm of the whole gradient, a scalar on the device; where it is sharded, one number is sent."""
    present = [share for share in shares if share.part.grad is not None]
    gradients = [share.part.grad for share in present if share.part.grad is not None]
    if not any(share.sharded for share in present):
        return nn.utils.get_total_norm(gradients)
    squares = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square()
    copies = torch.tensor([_copies(share.whole) for share in present], dtype=torch.float32)
    total = (squares / copies.to(squares.device, non_blocking=True)).sum()
    dist.all_reduce(total)
    return total.sqrt()


def agree_on_overflow(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Let what one process has found in its parts of the gradients count for all, so that all keep the same scale."""
    if scaler.is_enabled():
        for found in scaler._found_inf_per_device(optimizer).values():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)


def _copies(whole: Any) -> int:
    """How many processes of the run hold the same elements of the `DTensor` `whole`."""
    cuts = [
        size for size, place in zip(whole.device_mesh.shape, whole.placements, strict=True) if hasattr(place, "dim")
    ]
    return dist.get_world_size() // torch.Size(cuts).numel()


def whole_state(optimizer: torch.optim.Optimizer, shares: Iterable[Share]) -> dict[str, Any]:
    """The state of an optimizer that moves the parts, as one that moves the wholes has it: sharded moments are
    `DTensor`s."""
    state = optimizer.state_dict()
    entries = {index: dict(entry) for index, entry in state["state"].items()}
    for index, share in _sharded(optimizer, shares):
        for key, value in entries.get(index, {}).items():
            if isinstance(value, Tensor) and value.shape == share.part.shape:
                entries[index][key] = share.as_whole(value)
    return {**state, "state": entries}


def part_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], shares: Iterable[Share]) -> dict[str, Any]:
    """The reverse: `state`, whose tensors are whole, as the state of `optimizer`, which moves the parts."""
    sharded = dict(_sharded(optimizer, shares))
    entries: dict[int, dict[str, Any]] = {}
    stored: list[tuple[Tensor, Stored]] = []
    for index, entry in state["state"].items():
        share = sharded.get(index)
        entries[index] = dict(entry)
        for key, value in entry.items():
            if not isinstance(value, (Tensor, Stored)):
                continue
            if share is None or value.shape != share.whole.shape:
                if isinstance(value, Stored):
                    entries[index][key] = torch.empty(value.shape, dtype=value.dtype)
                    stored.append((entries[index][key], value))
            elif isinstance(value, Stored):
                entries[index][key] = torch.empty_like(share.part, dtype=value.dtype)
                stored.append((share.as_whole(entries[index][key]), value))
            else:
                entries[index][key] = share.as_part(value)
    fill_all(stored)
    return {**state, "state": entries}


def _sharded(optimizer: torch.optim.Optimizer, shares: Iterable[Share]) -> list[tuple[int, Share]]:
    """The sharded parameters of `optimizer`, by their number in its state."""
    share_of = {share.part: share for share in shares if share.sharded}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(index, share_of[part]) for index, part in enumerate(parameters) if part in share_of]
