"""Products with float32 matrices by oneDNN, for training on a CPU.

PyTorch takes oneDNN by itself for bfloat16, and MKL for float32. On AMD's processors oneDNN needs three quarters of
MKL's time for large products. Both add in float32, in another order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
LEAST = 1 << 27  # multiplications; in smaller products the time that a call takes outweighs the gain


def takes(x: Tensor, rows: int) -> bool:
    """Whether the product of `x` `(..., in)` with a matrix of `rows` rows is one to leave to oneDNN."""
    return x.is_cpu and x.dtype == torch.float32 and x.numel() * rows >= LEAST and AVAILABLE


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` of float32 tensors on a CPU, without a gradient of its own."""
    return cast(Tensor, LINEAR(x, weight, bias))


class OneDnnLinear(nn.Linear):
    """A linear layer whose large products oneDNN computes where gradients are wanted; else it is as any other."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` `(..., in_features)` times the transposed weight: `(..., out_features)`."""
        if not torch.is_grad_enabled() or not takes(input, self.out_features):
            return super().forward(input)
        return cast(Tensor, _Linear.apply(input, self.weight, self.bias))  # type: ignore[no-untyped-call]


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` compute with oneDNN, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        # The gradient of the weights has both matrices the wrong way round for oneDNN: turning them costs the gain.
        return (
            product(grad, weight.t()) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


# An operator of its own, since the compiler takes that of PyTorch for weights that never change.
@torch.library.custom_op("quern::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


@_linear.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LINEAR = torch.ops.quern.linear.default
