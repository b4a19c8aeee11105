"""AdamW with cautious weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CautiousAdamW(torch.optim.AdamW):
    """AdamW whose decay spares the weights that the step makes larger (Chen et al., 2025, arXiv:2510.12402).

    A weight w decays by lr * weight_decay * w only where w and its momentum have the same sign, the momentum being that
    of this step. The rest is `torch.optim.AdamW`, with a decay of zero; the state is its state. `found_inf` is obeyed.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, fused: bool) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=fused)
        for group in self.param_groups:
            group["cautious_weight_decay"], group["weight_decay"] = group["weight_decay"], 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step from the gradients of the parameters that have one."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            decay = group["lr"] * group["cautious_weight_decay"]
            for parameter in group["params"] if decay > 0 else ():
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].get("exp_avg") if parameter in self.state else None
                gradient, gain = parameter.grad, 1.0 - group["betas"][0]
                momentum = gradient if momentum is None else torch.lerp(momentum, gradient, gain)
                share = decay if found_inf is None else decay * (1.0 - found_inf)
                parameter.sub_(torch.where(momentum * parameter > 0, parameter, 0.0).mul_(share))
        return super().step(closure)  # type: ignore[no-any-return]
