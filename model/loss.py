"""Cross-entropy of the next token, fused with the output matrix so that the logits of a batch never exist at once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model import onednn
from model.sharding import RowsHeld, rows_held

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

    Where several processes have the same `hidden` and `targets`, and each some rows of `weight` (a `DTensor`), each
    makes the logits of its rows; what travels is, for each token, their maximum and the sum of their exponentials, and
    the gradient of `hidden`, a sum over all rows (Megatron-LM, Shoeybi et al., 2019).
    """
    wants_gradient = torch.is_grad_enabled()
    held = rows_held(weight)
    loss = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden,
        held.rows,
        held,
        targets,
        vocab_size,
        soft_cap,
        z_loss,
        wants_gradient and hidden.requires_grad,
        wants_gradient and weight.requires_grad,
    )
    return cast(Tensor, loss)


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, soft_cap: float | None = None
) -> Tensor:
    """The cross-entropy of each token by itself, `(tokens,)` float32, 0 where the target is -100.

    For losses that are no plain sum of it, whose gradient is not known before all of them are. Arguments are those of
    `linear_cross_entropy`; here, too, only the logits of one chunk exist at a time: those of the others are made anew
    in the backward pass.
    """
    rows = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
    parts = [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]
    return torch.cat(
        [
            checkpoint(
                *(_cross_entropies, hidden[part], weight, targets[part], vocab_size, soft_cap),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for part in parts
        ]
    )


def _cross_entropies(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, soft_cap: float | None
) -> Tensor:
    logits = soft_capped(F.linear(hidden, weight).float(), soft_cap)
    return F.cross_entropy(logits[:, :vocab_size], targets, ignore_index=IGNORED, reduction="none")


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)` (Bello et al., 2016; Gemma 2, 2024), in float32; without a cap the logits as given."""
    return logits if cap is None else torch.tanh(logits.float() / cap) * cap


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        held: RowsHeld,
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
        padding = slice(max(0, vocab_size - held.first), None)
        rows = CPU_CHUNK if device == "cpu" else CHUNK
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            inputs, kept = hidden[part].to(dtype), targets[part, None] != IGNORED
            place = targets[part, None] - held.first
            index = place.clamp(0, len(matrix) - 1)
            here = place == index  # the target's row is one of these, and there is a target
            multiply = onednn.product if onednn.takes(inputs, len(matrix)) else F.linear
            logits = soft_capped(multiply(inputs, matrix).float(), soft_cap)
            logits[:, padding] = -torch.inf
            log_probabilities, log_partition = _log_softmax(logits, held)
            loss -= torch.where(here, log_probabilities.gather(1, index), 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_probabilities.exp_()
            if z_loss:
                grad *= 1 + 2 * z_loss * log_partition
            grad.scatter_add_(1, index, -here.float())
            if soft_cap is not None:
                grad.addcmul_(grad, logits.div_(soft_cap).square_(), value=-1)
                grad[:, padding] = 0.0
            grad_logits = grad.to(dtype)
            # Tokens without a target are left out here, where it takes a pass over d_model and not the vocabulary.
            if grad_hidden is not None:
                grad_hidden[part] = torch.where(kept, multiply(grad_logits, matrix.t()), 0.0)
            if grad_weight is not None:
                counted = torch.where(kept, inputs, 0.0)
                if dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, counted)
                else:
                    grad_weight += grad_logits.T @ counted
        held.sum_(loss)
        if grad_hidden is not None:
            held.sum_(grad_hidden)
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
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _log_softmax(logits: Tensor, held: RowsHeld) -> tuple[Tensor, Tensor]:
    """Logarithms of the softmax over all rows, at those that are held, and of its denominator `(tokens, 1)`."""
    if held.group is None:
        whole = F.log_softmax(logits, dim=-1)
        return whole, logits[:, :1] - whole[:, :1]
    peak = held.maximum_(logits.amax(dim=-1, keepdim=True))
    shifted = logits - peak
    log_sum = held.sum_(shifted.exp().sum(dim=-1, keepdim=True)).log_()
    return shifted.sub_(log_sum), peak + log_sum
