"""Weights in eight or four bits: less to read per token, for a little accuracy. Activations stay as they are.

Each row of an int8 matrix has one scale, its largest magnitude over 127. Four bits take a scale for every 32 weights,
as llama.cpp's Q4_0, chosen for the smallest squared error; there the output matrix, which is the most sensitive, has
eight.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.transformer import Transformer

Quantize = Literal["none", "int8", "int4"]
GROUP = 32  # weights of four bits that share a scale
_FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)  # of the scale by the largest weight, which are tried
_ROWS = 4096  # of a matrix that are worked on at once


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are int8 `(out, in)` with scales `(out, 1)`, or in pairs with bfloat16 scales.

    `numbers` of four bits are uint8 `(out, in / 2)`: of each group of 32, byte i holds weight i in its lower bits and
    weight i + 16 in its upper ones, plus 8. Zeros fill the width up to a multiple of 32.
    """

    numbers: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: Literal[4, 8]) -> None:
        super().__init__()
        self.bits, self.out_features, self.in_features = bits, *weight.shape
        pack = _pack_int8 if bits == 8 else _pack_int4
        parts = [
            pack(F.pad(rows.float(), (0, -self.in_features % GROUP))) for rows in torch.split(weight.detach(), _ROWS)
        ]
        self.register_buffer("numbers", torch.cat([numbers for numbers, _ in parts]))
        self.register_buffer("scales", torch.cat([scales for _, scales in parts]))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `(..., in_features)` times the weights, made whole again for this product, plus the bias."""
        return F.linear(x, self.whole(x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weights in float32, as a plain layer has them."""
        return self.whole()

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `(out, in)` that the numbers stand for."""
        if self.bits == 8:
            return (self.numbers.to(dtype) * self.scales.to(dtype))[:, : self.in_features]
        halves = torch.stack([self.numbers & 15, self.numbers >> 4]).to(dtype) - 8
        grouped = halves.view(2, self.out_features, -1, GROUP // 2).permute(1, 2, 0, 3).flatten(2)
        return (grouped * self.scales.to(dtype)[..., None]).flatten(1)[:, : self.in_features]


def quantize_(model: Transformer, kind: Quantize) -> None:
    """Store the matrices of `model` in eight or four bits, in place; it can then no longer be trained.

    Embeddings, norms, biases and gates stay as they are.
    """
    if kind == "none":
        return
    head, model.head = model.head, None
    output = model.token_embedding.weight if head is None else head.weight
    blocks: list[Any] = list(model.blocks)
    for parent in [module for block in blocks for module in (block.attention, block.feed_forward)]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name != "value_gate":
                setattr(parent, name, QuantizedLinear(layer.weight, layer.bias, 8 if kind == "int8" else 4))
    setattr(model, "head", QuantizedLinear(output, None, 8))


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales).round_().to(torch.int8), scales


def _pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    # The largest magnitude becomes -8, the one end of the range that has no opposite.
    peak = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales, least = torch.ones_like(peak), torch.full_like(peak, torch.inf)
    for factor in _FACTORS:
        tried = (peak * (-factor / 8)).bfloat16().float()
        error = (groups - _rounded(groups, tried) * tried).square().sum(dim=2, keepdim=True)
        better = error < least
        scales, least = torch.where(better, tried, scales), torch.where(better, error, least)
    bits = (_rounded(groups, scales) + 8).to(torch.uint8)
    packed = bits[..., : GROUP // 2] | (bits[..., GROUP // 2 :] << 4)
    return packed.flatten(1), scales.squeeze(2).bfloat16()


def _rounded(groups: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, groups / scales).round_().clamp_(-8, 7)
