"""Matrix products in 8-bit floating point, for GPUs that have them: twice the rate of bfloat16 on Hopper and later.

As in torchao's and nanochat's training: weights and what they multiply are float8_e4m3 (Micikevicius et al., 2022),
gradients float8_e5m2, each tensor scaled by its own largest magnitude at the moment it is used. Sums are kept in higher
precision, and weights, gradients and optimizer state stay as they were; so a checkpoint does not tell of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MULTIPLE = 16  # the kernels take no other widths
_SMALLEST = 1e-12  # a tensor of zeros needs a scale as well


class Scaled(NamedTuple):
    """`values * scale` is what they stand for, up to rounding; `scale` is a float32 scalar on the same device."""

    values: Tensor
    scale: Tensor

    def transposed(self) -> Scaled:
        """The same matrix the other way round, row by row in memory."""
        return Scaled(self.values.t().contiguous(), self.scale)


def scaled(tensor: Tensor, dtype: torch.dtype) -> Scaled:
    """`tensor` in the 8-bit type `dtype`, scaled so that its largest magnitude is the type's largest number."""
    largest = torch.finfo(dtype).max
    scale = tensor.detach().abs().amax().float().clamp(min=_SMALLEST) / largest
    return Scaled((tensor.float() / scale).clamp(-largest, largest).to(dtype), scale)


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits where gradients are wanted, and as any other where not.

    So evaluation sees the model that a checkpoint holds. A number of rows that is no multiple of 16 is left alone too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`input` `(..., in_features)` times the transposed weight; bfloat16 `(..., out_features)`."""
        rows = input.numel() // self.in_features
        if not torch.is_grad_enabled() or rows % MULTIPLE:
            return super().forward(input)
        flat = input.reshape(rows, self.in_features)
        product = cast(Tensor, _Product.apply(flat, self.weight))  # type: ignore[no-untyped-call]
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.reshape(*input.shape[:-1], self.out_features)


def use_float8(model: nn.Module) -> list[str]:
    """Let the linear layers of `model.blocks` multiply in 8 bits, in place; returns their names.

    Those with a width that is no multiple of 16 stay as they are, such as gates; the output matrix does, too, for its
    loss is the most sensitive.
    """
    changed = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.startswith("blocks."):
            if module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0:
                module.__class__ = Float8Linear
                changed.append(name)
    return changed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(scaled(rows, torch.float8_e4m3fn), scaled(weight, torch.float8_e4m3fn), fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        grads = scaled(grad.contiguous(), torch.float8_e5m2)
        of_rows = _multiply(grads, scaled(weight, torch.float8_e4m3fn).transposed(), fast=False)
        of_weight = _multiply(grads.transposed(), scaled(rows, torch.float8_e4m3fn).transposed(), fast=False)
        return of_rows.to(rows.dtype), of_weight.to(weight.dtype)


def _multiply(left: Scaled, right: Scaled, fast: bool) -> Tensor:
    """`left` `(m, k)` times the transpose of `right` `(n, k)`, both row by row, as the kernels want them: bfloat16.

    `fast` sums in fewer bits, which is accurate enough for the forward pass alone.
    """
    return torch._scaled_mm(
        left.values,
        right.values.t(),
        scale_a=left.scale,
        scale_b=right.scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
