"""Linear layers whose weights are stored in eight or four bits, for a little accuracy. Activations stay as they are.

Each row of an int8 matrix has one scale, its largest magnitude over 127. `int4` takes a scale for every 32 weights, as
llama.cpp's Q4_0, chosen for the smallest squared error. `nf4` takes for every 64 weights their largest magnitude as
scale, and 16 levels between that and its opposite, as close together as normal numbers lie (QLoRA, Dettmers et al.,
2023, https://arxiv.org/abs/2305.14314, equation 4); its scales are bfloat16 and not quantized a second time.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Kind = Literal["int8", "int4", "nf4"]
_FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)  # of the scale by the largest weight, which are tried
_ROWS = 1024  # of a matrix that are worked on at once
_TAIL = 0.9677083  # of the normal distribution: QLoRA's outermost quantile


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are int8 `(out, in)` with scales `(out, 1)`, or in pairs with bfloat16 scales.

    `numbers` of four bits are uint8 `(out, in / 2)`: of each group of 32, or 64 in nf4, byte i holds weight i in its
    lower bits and the one half a group further in its upper ones; of int4 plus 8, of nf4 as the number of its level.
    Zeros fill the width up to a multiple of the group. The weights are not trained, but gradients pass through to what
    they multiply.
    """

    numbers: Tensor
    scales: Tensor
    pairs: Tensor | None
    """Of nf4: the two levels that each of 256 bytes stands for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        super().__init__()
        self.bits = 8 if kind == "int8" else 4
        self.out_features, self.in_features = weight.shape
        pack = {"int8": _pack_int8, "int4": _pack_int4, "nf4": _pack_nf4}[kind]
        padding = -self.in_features % (64 if kind == "nf4" else 32)
        parts = [pack(F.pad(rows.float(), (0, padding))) for rows in torch.split(weight.detach(), _ROWS)]
        self.register_buffer("numbers", torch.cat([numbers for numbers, _ in parts]))
        self.register_buffer("scales", torch.cat([scales for _, scales in parts]))
        self.register_buffer("pairs", _pairs().to(weight.device) if kind == "nf4" else None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `(..., in_features)` times the weights, made whole again for this product, plus the bias."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.whole(x.dtype), self.bias)
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        packed = self.numbers, self.scales, self.pairs
        product = cast(Tensor, _Product.apply(x, self.in_features, *packed))  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @property
    def weight(self) -> Tensor:
        """The weights in float32, as a plain layer has them."""
        return self.whole()

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `(out, in)` that the numbers stand for."""
        return _whole(self.numbers, self.scales, self.pairs, self.in_features, dtype)


class _Product(torch.autograd.Function):
    """Keeps the packed weights for the backward pass, not the whole ones, which would take the memory again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, numbers: Tensor, scales: Tensor, pairs: Tensor | None) -> Tensor:
        ctx.save_for_backward(numbers, scales, pairs)
        ctx.width = width
        return F.linear(x, _whole(numbers, scales, pairs, width, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        numbers, scales, pairs = ctx.saved_tensors
        return grad @ _whole(numbers, scales, pairs, ctx.width, grad.dtype), None, None, None, None


def _whole(numbers: Tensor, scales: Tensor, pairs: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    if numbers.dtype == torch.int8:
        return (numbers.to(dtype) * scales.to(dtype))[:, :width]
    if pairs is None:
        halves = torch.stack([numbers & 15, numbers >> 4]).to(dtype) - 8
        grouped = halves.view(2, *scales.shape, -1).permute(1, 2, 0, 3).flatten(2)
    else:
        grouped = F.embedding(numbers.int(), pairs.to(dtype)).view(*scales.shape, -1, 2).transpose(2, 3).flatten(2)
    return (grouped * scales.to(dtype)[..., None]).flatten(1)[:, :width]


def normal_levels() -> Tensor:
    """The 16 levels of nf4 in float32, from -1 to 1: quantiles of the normal distribution, eight of them above 0."""
    above, below = (torch.linspace(_TAIL, 0.5, number, dtype=torch.float64)[:-1] for number in (9, 8))
    levels = torch.cat([torch.special.ndtri(above), torch.zeros(1), -torch.special.ndtri(below)]).sort().values
    return (levels / levels.max()).float()


def _pairs() -> Tensor:
    levels = normal_levels()
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales).round_().to(torch.int8), scales


def _pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.view(len(weight), -1, 32)
    # The largest magnitude becomes -8, the one end of the range that has no opposite.
    peak = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales, least = torch.ones_like(peak), torch.full_like(peak, torch.inf)
    for factor in _FACTORS:
        tried = (peak * (-factor / 8)).bfloat16().float()
        error = (groups - _rounded(groups, tried) * tried).square().sum(dim=2, keepdim=True)
        better = error < least
        scales, least = torch.where(better, tried, scales), torch.where(better, error, least)
    return _paired((_rounded(groups, scales) + 8).to(torch.uint8)), scales.squeeze(2).bfloat16()


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.view(len(weight), -1, 64)
    scales = groups.abs().amax(dim=2, keepdim=True).bfloat16()
    levels = normal_levels().to(weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    shares = torch.where(scales == 0, 0.0, groups / scales.float())
    return _paired(torch.bucketize(shares, between, out_int32=True).to(torch.uint8)), scales.squeeze(2)


def _paired(bits: Tensor) -> Tensor:
    """Bytes `(out, in / 2)` of the four bits of each weight `(out, groups, group)`."""
    half = bits.shape[2] // 2
    return (bits[..., :half] | (bits[..., half:] << 4)).flatten(1)


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, groups / scales).round_().clamp_(-8, 7)
