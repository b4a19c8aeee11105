"""Tables of vectors whose gradient is the same to the last bit every time, in compiled graphs on a CPU too.

What the compiler makes of the gradient of an embedding lets several threads add to the same row, in the order in which
they come. PyTorch's own kernel gives each thread rows of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ExactEmbedding(nn.Embedding):
    """An embedding whose gradient PyTorch's kernel computes, wherever it stands."""

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the table at the ids `input` `(...)`: `(..., embedding_dim)`."""
        return cast(Tensor, _Lookup.apply(input, self.weight))  # type: ignore[no-untyped-call]


def use_exact_lookups(model: nn.Module) -> None:
    """Let the embeddings of `model` that are on a CPU compute their gradients exactly, in place."""
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.is_cpu:
            module.__class__ = ExactEmbedding


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = table.shape[0]
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = cast(tuple[Tensor], ctx.saved_tensors)
        return None, _gradient(grad, ids, ctx.rows)


# An operator of its own is one that the compiler leaves as it is.
@torch.library.custom_op("quern::embedding_gradient", mutates_args=())
def _gradient(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return cast(Tensor, torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False))


@_gradient.register_fake
def _shape(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))
