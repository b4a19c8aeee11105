"""Cross-entropy of the next token, fused with the output matrix so that the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK, CPU_CHUNK = 4096, 1024


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over the tokens of the cross-entropy between `softmax(hidden @ weight.T)` and `targets`, in float32.

    `hidden` is `(tokens, d_model)`, `weight` `(rows, d_model)` with rows >= vocab_size, `targets` `(tokens,)` int64
    with -100 where nothing is predicted. Rows of `weight` past `vocab_size` take no part. The logits are made in chunks
    of tokens, and each chunk's gradient is computed while its logits are at hand (as in Liger's fused kernel, Hsu et
    al., 2024), so the backward pass only scales what is already there. Matrix products run in autocast's type where it
    is on; logits, softmax and sums are float32.

    With `soft_cap` the logits go through `soft_cap` first. With `z_loss` the gradient, but not the value, is that of
    the cross-entropy plus `z_loss * log(sum(exp(logits))) ** 2` per predicted token (Chowdhery et al., 2022, section
    5): the term steers training, and the loss still compares with that of a run without it.
    """
    wants_gradient = torch.is_grad_enabled()
    loss = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        targets,
        vocab_size,
        soft_cap,
        z_loss,
        wants_gradient and hidden.requires_grad,
        wants_gradient and weight.requires_grad,
    )
    return cast(Tensor, loss)


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)` (Bello et al., 2016; Gemma 2, 2024), in float32; without a cap the logits as given."""
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        soft_cap: float | None,
        z_loss: float,
        hidden_gradient: bool,
        weight_gradient: bool,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        matrix = weight.to(dtype)
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if hidden_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_gradient else None
        rows = CPU_CHUNK if device == "cpu" else CHUNK
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            inputs, kept = hidden[part].to(dtype), targets[part, None] != IGNORED
            index = targets[part, None].clamp(min=0)
            logits = soft_capped(F.linear(inputs, matrix).float(), soft_cap)
            logits[:, vocab_size:] = -torch.inf
            log_probabilities = F.log_softmax(logits, dim=-1)
            of_target = log_probabilities.gather(1, index)
            loss -= torch.where(kept, of_target, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            minus_one = torch.full_like(kept, -1.0, dtype=torch.float32)
            grad = log_probabilities.exp_()
            if z_loss:
                grad *= 1 + 2 * z_loss * (logits.gather(1, index) - of_target)
            grad.scatter_add_(1, index, minus_one)
            if soft_cap is not None:
                grad.addcmul_(grad, logits.div_(soft_cap).square_(), value=-1)
                grad[:, vocab_size:] = 0.0
            grad_logits = grad.to(dtype)
            # Tokens without a target are left out here, where it takes a pass over d_model and not the vocabulary.
            if grad_hidden is not None:
                grad_hidden[part] = torch.where(kept, grad_logits @ matrix, 0.0)
            if grad_weight is not None:
                counted = torch.where(kept, inputs, 0.0)
                if dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, counted)
                else:
                    grad_weight += grad_logits.T @ counted
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None
