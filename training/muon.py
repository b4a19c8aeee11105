"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), batched over matrices of one shape.

`torch.optim.Muon` orthogonalises one matrix at a time. Here all matrices of a shape are stacked and orthogonalised
together, in bfloat16 where the device is fast in it (the iteration is stable in both, Jordan et al.). With its defaults
the numbers are those of `torch.optim.Muon` up to rounding, and so is the state, one `momentum_buffer` per parameter.

A step has three parts: `nesterov` and `descend` go element by element, so they may run on a shard of a matrix; between
them, `orthogonalise` and `even_out_neurons` need all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.orthogonalisation import Iteration, Method, iteration, orthogonalise
from training.precision import has_fast_bfloat16

Scalar = Tensor | float  # what a schedule may move is a 0-D tensor where the step is compiled


def muon_step(
    parameters: list[Tensor],  # matrices of one shape
    gradients: list[Tensor],
    buffers: list[Tensor],
    moments: list[Tensor],  # (rows, 1) for each matrix, or empty for plain Muon
    take: Tensor | None,  # 0-D float: 1 takes the step, 0 leaves everything as it is; None is 1
    rate: Scalar,
    weight_decay: Scalar,
    momentum: Scalar,
    second_moment: Scalar,
    cautious: bool,
    how: Iteration,
    dtype: torch.dtype,
) -> None:
    """Move `parameters`, `buffers` and `moments` in place."""
    update = orthogonalise(nesterov(gradients, buffers, take, momentum), how, dtype).to(parameters[0].dtype)
    if moments:
        update = even_out_neurons(update, moments, take, second_moment)
    descend(parameters, update, rate if take is None else rate * take, weight_decay, cautious)


def nesterov(gradients: list[Tensor], buffers: list[Tensor], take: Tensor | None, momentum: Scalar) -> Tensor:
    """Add the gradients to the buffers in place; returns what the momentum says of each, (count, rows, columns)."""
    gradient, gain = torch.stack(gradients), 1.0 - momentum
    if take is not None:
        gradient, gain = torch.where(take > 0, gradient, 0.0), gain * take
    buffer = torch.stack(buffers).lerp_(gradient, gain)
    torch._foreach_copy_(buffers, buffer.unbind())
    return gradient.lerp_(buffer, momentum)


def even_out_neurons(update: Tensor, moments: list[Tensor], take: Tensor | None, second_moment: Scalar) -> Tensor:
    """NorMuon (Li et al., 2025, https://arxiv.org/abs/2510.05491): rows that keep being moved far are held back.

    Each row, a neuron, is divided by the root of the running mean of its squares, kept in `moments`, and each matrix
    is brought back to the norm it had. (The paper brings it to 0.2 sqrt(rows * columns) instead: here `learning_rate`
    keeps the meaning that it has without.) `update` is (count, rows, columns), and so is the result.
    """
    gain = 1.0 - second_moment if take is None else (1.0 - second_moment) * take
    squares = update.square().mean(dim=-1, keepdim=True)
    moment = torch.stack(moments).lerp_(squares, gain)
    torch._foreach_copy_(moments, moment.unbind())
    inverse = moment.clamp(min=1e-16).reciprocal()
    kept = squares.sum(dim=-2, keepdim=True) / (squares * inverse).sum(dim=-2, keepdim=True).clamp(min=1e-30)
    return update * (inverse * kept).sqrt()


def descend(parameters: list[Tensor], update: Tensor, rate: Scalar, weight_decay: Scalar, cautious: bool) -> None:
    """Move the parameters in place by `update` (count, rows, columns), and let them decay.

    `cautious` (Chen et al., 2025, https://arxiv.org/abs/2510.12402) spares the weights that the update makes larger.
    """
    rows, columns = parameters[0].shape
    if cautious:
        stack = torch.stack(parameters)
        decay = torch.where(stack * update >= 0, stack, 0.0).mul_(rate * weight_decay)
        torch._foreach_sub_(parameters, decay.unbind())
    elif isinstance(weight_decay, Tensor) or weight_decay > 0:
        torch._foreach_mul_(parameters, 1.0 - rate * weight_decay)
    torch._foreach_sub_(parameters, update.mul_(rate * max(1.0, rows / columns) ** 0.5).unbind())


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; for the hidden matrices of a network, all of them 2-D.

    With m the momentum: buffer = m * buffer + (1 - m) * gradient; update = orthogonalised((1 - m) * gradient + m *
    buffer); weight = (1 - lr * weight_decay) * weight - lr * max(1, rows / columns) ** 0.5 * update, as Jordan's own
    code and `torch.optim.Muon` have it. A weight is (out_features, in_features): the factor keeps the change of the
    output, per unit of input, the same where a layer widens. With a `second_moment`, NorMuon: see `even_out_neurons`.

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
        self._step: Callable[..., None] = (
            torch.compile(muon_step, fullgraph=True, dynamic=False) if compiled else muon_step
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients of the parameters that have one."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            stacks: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks[parameter.shape, parameter.device, parameter.dtype].append(parameter)
            for (_, device, _), parameters in stacks.items():
                scalars = [group["lr"], group["weight_decay"], group["momentum"], group["second_moment"] or 0.0]
                take = None
                if device.type != "cpu":
                    scalars = [torch.full((), value, device=device) for value in scalars]
                    take = None if self.found_inf is None else 1.0 - self.found_inf
                elif self.found_inf is not None and self.found_inf > 0:
                    continue
                self._step(
                    parameters,
                    [parameter.grad for parameter in parameters],
                    [self._buffer(parameter) for parameter in parameters],
                    [] if group["second_moment"] is None else [self._moment(parameter) for parameter in parameters],
                    take,
                    *scalars,
                    group["cautious"],
                    iteration(group["orthogonalisation"], group["steps"]),
                    torch.bfloat16 if has_fast_bfloat16(device) else torch.float32,
                )
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
            state["second_moment"] = torch.zeros_like(parameter[:, :1])
        moment: Tensor = state["second_moment"]
        return moment
