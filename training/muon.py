"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), batched over matrices of one shape.

`torch.optim.Muon` orthogonalises one matrix at a time. Here all matrices of a shape are stacked and orthogonalised
together, in bfloat16 where the device is fast in it (the iteration is stable in both, Jordan et al.). With its defaults
the numbers are those of `torch.optim.Muon` up to rounding, and so is the state, one `momentum_buffer` per parameter.

A step has three parts: `nesterov` and `descend` go element by element, so they may run on a shard of a matrix; between
them, `orthogonalise` needs all of it. On one device they follow one another, for each shape. On several, the matrices
of a shape are dealt to the processes (see `training.dealing`), in three passes over the shapes:

1. Each process does `nesterov` on what it holds, and, where that is a part, starts sending it to the owners.
2. Each waits for the matrices that it owns, orthogonalises them, and starts sending the result to all.
3. Each waits for the update of what it holds, and descends.

So what travels for one shape does so while the other shapes are computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.devices import has_fast_bfloat16
from training.dealing import Dealing, Pending
from training.orthogonalisation import Iteration, Method, iteration, orthogonalise

Scalar = Tensor | float  # what a schedule may move is a 0-D tensor where the step is compiled


class Stack(NamedTuple):
    """Matrices of one shape, or what is held here of such, and how to move them: all that a step needs to know."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor]
    moments: list[Tensor]
    """(rows, 1) for each whole matrix, the same on every process; empty for plain Muon."""
    take: Tensor | None
    """0-D float: 1 takes the step, 0 leaves everything as it is; None is 1."""
    rate: Scalar
    weight_decay: Scalar
    momentum: Scalar
    second_moment: Scalar
    cautious: bool
    how: Iteration
    dtype: torch.dtype

    @property
    def taken_rate(self) -> Scalar:
        """The rate, or 0 where the step is not taken."""
        return self.rate if self.take is None else self.rate * self.take


def muon_step(of: Stack) -> None:
    """Move parameters, buffers and moments in place."""
    rows, columns = of.parameters[0].shape
    update = orthogonalise(nesterov(of.gradients, of.buffers, of.take, of.momentum), of.how, of.dtype)
    update = update.to(of.parameters[0].dtype)
    if of.moments:
        squares = update.square().mean(dim=-1, keepdim=True)
        update = update * neuron_factors(squares, of.moments, of.take, of.second_moment)
    descend(of.parameters, update, (rows, columns), of.taken_rate, of.weight_decay, of.cautious)


def nesterov(gradients: list[Tensor], buffers: list[Tensor], take: Tensor | None, momentum: Scalar) -> Tensor:
    """Add the gradients to the buffers in place; returns what the momentum says of each, (count, rows, columns)."""
    gradient, gain = torch.stack(gradients), 1.0 - momentum
    if take is not None:
        gradient, gain = torch.where(take > 0, gradient, 0.0), gain * take
    buffer = torch.stack(buffers).lerp_(gradient, gain)
    torch._foreach_copy_(buffers, buffer.unbind())
    return gradient.lerp_(buffer, momentum)


def neuron_factors(squares: Tensor, moments: list[Tensor], take: Tensor | None, second_moment: Scalar) -> Tensor:
    """NorMuon (Li et al., 2025, https://arxiv.org/abs/2510.05491): rows that keep being moved far are held back.

    Each row of an update, a neuron, is to be divided by the root of the running mean of its squares, kept in `moments`,
    and each matrix brought back to the norm it had. (The paper brings it to 0.2 sqrt(rows * columns) instead: here
    `learning_rate` keeps the meaning that it has without.) `squares` (count, rows, 1) are the mean squares of the rows;
    the factors have that shape.
    """
    gain = 1.0 - second_moment if take is None else (1.0 - second_moment) * take
    moment = torch.stack(moments).lerp_(squares, gain)
    torch._foreach_copy_(moments, moment.unbind())
    inverse = moment.clamp(min=1e-16).reciprocal()
    kept = squares.sum(dim=-2, keepdim=True) / (squares * inverse).sum(dim=-2, keepdim=True).clamp(min=1e-30)
    return (inverse * kept).sqrt()


def descend(
    parameters: list[Tensor],
    update: Tensor,
    shape: tuple[int, int],
    rate: Scalar,
    weight_decay: Scalar,
    cautious: bool,
) -> None:
    """Move the parameters, matrices of `shape` or parts of such, in place by `update`, and let them decay.

    `cautious` (Chen et al., 2025, https://arxiv.org/abs/2510.12402) spares the weights that the update makes larger.
    """
    rows, columns = shape
    if cautious:
        stack = torch.stack(parameters)
        decay = torch.where(stack * update >= 0, stack, 0.0).mul_(rate * weight_decay)
        torch._foreach_sub_(parameters, decay.unbind())
    elif isinstance(weight_decay, Tensor) or weight_decay > 0:
        torch._foreach_mul_(parameters, 1.0 - rate * weight_decay)
    torch._foreach_sub_(parameters, update.mul_(rate * max(1.0, rows / columns) ** 0.5).unbind())


class Phases(NamedTuple):
    """The functions of a step that is dealt, which may be compiled."""

    nesterov: Callable[..., Tensor] = nesterov
    orthogonalise: Callable[..., Tensor] = orthogonalise
    neuron_factors: Callable[..., Tensor] = neuron_factors
    descend: Callable[..., None] = descend


class DealtStep:
    """`muon_step` for matrices that are dealt, or parts of such: to be begun, orthogonalised, and finished."""

    def __init__(self, dealing: Dealing, phases: Phases, of: Stack) -> None:
        self._dealing, self._phases, self._of = dealing, phases, of
        self._pending: Pending

    def begin(self) -> None:
        """Momentum, and off with it to those who own the matrices."""
        of = self._of
        update = self._phases.nesterov(of.gradients, of.buffers, of.take, of.momentum)
        self._pending = self._dealing.to_owners(update if self._dealing.repeated else update.to(of.dtype))

    def orthogonalise(self) -> None:
        """What is owned, and off with it to all."""
        of, owned = self._of, self._pending()
        if len(owned):
            owned = self._phases.orthogonalise(owned, of.how, of.dtype)
        self._pending = self._dealing.from_owners(owned.to(of.dtype), len(of.parameters))

    def finish(self) -> None:
        """Move what is held here."""
        of, dealing = self._of, self._dealing
        update = self._pending().to(of.parameters[0].dtype)
        if of.moments:
            squares = dealing.mean_squares(update)
            update = update * dealing.own_rows(
                self._phases.neuron_factors(squares, of.moments, of.take, of.second_moment)
            )
        self._phases.descend(of.parameters, update, dealing.shape, of.taken_rate, of.weight_decay, of.cautious)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; for the hidden matrices of a network, all of them 2-D.

    With m the momentum: buffer = m * buffer + (1 - m) * gradient; update = orthogonalised((1 - m) * gradient + m *
    buffer); weight = (1 - lr * weight_decay) * weight - lr * max(1, rows / columns) ** 0.5 * update, as Jordan's own
    code and `torch.optim.Muon` have it. A weight is (out_features, in_features): the factor keeps the change of the
    output, per unit of input, the same where a layer widens. With a `second_moment`, NorMuon: see `neuron_factors`.

    `found_inf`, a 0-D float tensor that the caller sets before `step`, makes a step change nothing where it is 1: the
    convention of PyTorch's fused optimizers, which needs no look at the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        orthogonalisation: Method = "newton_schulz",
        steps: int = 5,
        second_moment: float | None = None,
        cautious: bool = False,
        compiled: bool = False,
        dealings: Mapping[Tensor, Dealing] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "orthogonalisation": orthogonalisation,
            "steps": steps,
            "second_moment": second_moment,
            "cautious": cautious,
        }
        super().__init__(params, defaults)
        wrong = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if wrong:
            raise ValueError(f"Muon takes matrices only, not parameters of shape {wrong[0]}")
        self._dealings = dealings or {}
        self._step = _compiled(muon_step) if compiled else muon_step
        self._phases = Phases(*map(_compiled, Phases())) if compiled else Phases()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients of the parameters that have one."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            stacks: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    dealing = self._dealings.get(parameter)
                    stacks[dealing, parameter.shape, parameter.device, parameter.dtype].append(parameter)
            dealt: list[DealtStep] = []
            for (dealing, _, device, _), parameters in stacks.items():
                rates = [group["lr"], group["weight_decay"], group["momentum"], group["second_moment"] or 0.0]
                take = None
                if device.type != "cpu":
                    rates = [torch.full((), value, device=device) for value in rates]
                    take = None if self.found_inf is None else 1.0 - self.found_inf
                elif self.found_inf is not None and self.found_inf > 0:
                    continue
                rate, weight_decay, momentum, second_moment = rates
                stack = Stack(
                    parameters,
                    [parameter.grad for parameter in parameters if parameter.grad is not None],
                    [self._buffer(parameter) for parameter in parameters],
                    [] if group["second_moment"] is None else [self._moment(parameter) for parameter in parameters],
                    take,
                    rate,
                    weight_decay,
                    momentum,
                    second_moment,
                    group["cautious"],
                    iteration(group["orthogonalisation"], group["steps"]),
                    torch.bfloat16 if has_fast_bfloat16(device) else torch.float32,
                )
                if dealing is None:
                    self._step(stack)
                else:
                    dealt.append(DealtStep(dealing, self._phases, stack))
            for phase in (DealtStep.begin, DealtStep.orthogonalise, DealtStep.finish):
                for each in dealt:
                    phase(each)
        return loss

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "second_moment" not in state:
            dealing = self._dealings.get(parameter)
            state["second_moment"] = parameter.new_zeros(dealing.shape[0] if dealing else len(parameter), 1)
        moment: Tensor = state["second_moment"]
        return moment
