"""Normalisation: of the residual stream, and of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from config.model import ModelConfig
from model.sharding import with_summed_gradient

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of `(..., d_model)` that `config` names, with a learned scale."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019) with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `(..., width)` over its last dimension."""
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """The same of queries or keys `(..., head_dim)`, with one scale for all heads, in the dtype that they have.

    Where several processes share the heads, `mesh` is theirs: the gradient of the scale is summed over it.
    """

    mesh: DeviceMesh | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.mesh is None else with_summed_gradient(self.weight, self.mesh)
        return rms_norm(x, weight.to(x.dtype), self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps)` over the last dimension, times `weight` if given; computed in float32."""
    if x.device.type != "cpu":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    y: Tensor = _RMSNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return y if weight is None else y * weight


class _RMSNorm(torch.autograd.Function):
    """The same without a scale. PyTorch has no fused kernel for the CPU; this takes half of its passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / y.shape[-1]
        return (torch.addcmul(grad, y, along, value=-1) * scale).to(grad.dtype), None
