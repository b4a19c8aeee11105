"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), batched over matrices of one shape.

`torch.optim.Muon` orthogonalises one matrix at a time. Here all matrices of a shape are stacked and go through the
Newton-Schulz steps together, in bfloat16 where the device is fast in it (the iteration is stable in both, Jordan et
al.). The numbers are those of `torch.optim.Muon` up to rounding, and so is the state, one
`momentum_buffer` per parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.precision import has_fast_bfloat16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at zero, and within [0.7, 1.2] after five steps


def orthogonalise(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """U S' V' with S' near 1 for each U S V' of `matrices` (count, rows, columns): about the nearest orthogonal one.

    `steps` Newton-Schulz iterations of Jordan's quintic in `dtype`; returns (count, rows, columns) in `dtype`.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_step(
    parameters: list[Tensor],  # matrices of one shape
    gradients: list[Tensor],
    buffers: list[Tensor],
    take: Tensor | None,  # 0-D float: 1 takes the step, 0 leaves parameters and buffers as they are; None is 1
    rate: Tensor | float,
    weight_decay: Tensor | float,
    momentum: Tensor | float,
    newton_schulz_steps: int,
    dtype: torch.dtype,
) -> None:
    """Move `parameters` and `buffers` in place. What a schedule may move is a 0-D tensor where this is compiled."""
    rows, columns = parameters[0].shape
    gradient, gain = torch.stack(gradients), 1.0 - momentum
    if take is not None:
        gradient, gain, rate = torch.where(take > 0, gradient, 0.0), gain * take, rate * take
    buffer = torch.lerp(torch.stack(buffers), gradient, gain)
    torch._foreach_copy_(buffers, buffer.unbind())
    update = orthogonalise(torch.lerp(gradient, buffer, momentum), newton_schulz_steps, dtype)
    update = update.to(parameters[0].dtype) * (-rate * max(1.0, rows / columns) ** 0.5)
    torch._foreach_mul_(parameters, 1.0 - rate * weight_decay)
    torch._foreach_add_(parameters, update.unbind())


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; for the hidden matrices of a network, all of them 2-D.

    With m the momentum: buffer = m * buffer + (1 - m) * gradient; update = NS((1 - m) * gradient + m * buffer);
    weight = (1 - lr * weight_decay) * weight - lr * max(1, rows / columns) ** 0.5 * update, as Jordan's own code and
    `torch.optim.Muon` have it. A weight is (out_features, in_features): the factor keeps the change of the output, per
    unit of input, the same where a layer widens.

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
        newton_schulz_steps: int = 5,
        compiled: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "newton_schulz_steps": newton_schulz_steps,
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
                scalars = [group["lr"], group["weight_decay"], group["momentum"]]
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
                    take,
                    *scalars,
                    group["newton_schulz_steps"],
                    torch.bfloat16 if has_fast_bfloat16(device) else torch.float32,
                )
        return loss

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
