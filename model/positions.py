"""Rotary position embedding (Su et al., 2021), in the half-split form that Llama's weights use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config.model import RopeScaling

Rotation = tuple[Tensor, Tensor]


class RotaryTables(nn.Module):
    """Cosines and sines of every position up to `context_length`, the first half of the sines with their sign turned.

    The tables follow from the configuration alone. They are therefore not part of a checkpoint, and whenever the module
    is moved or cast (`to`, `half`, `to_empty` after the meta device) they are made anew, in float32.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context_length: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.head_dim, self.context_length, self.theta, self.scaling = head_dim, context_length, theta, scaling
        self._build(torch.get_default_device())

    def _build(self, device: torch.device) -> None:
        if device.type == "meta":
            for name in ("cos", "sin"):
                table = torch.empty(self.context_length, self.head_dim, device=device)
                self.register_buffer(name, table, persistent=False)
            return
        # In float64 on the CPU first, so that every device gets the same bits.
        frequencies = rotary_frequencies(self.head_dim, self.theta, self.scaling)
        angles = torch.outer(torch.arange(self.context_length, dtype=torch.float64, device="cpu"), frequencies)
        cos, sin = angles.cos().float(), angles.sin().float()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).to(device), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build(self.cos.device)
        return self

    def forward(self, positions: Tensor | int) -> Rotation:
        """Cosines and sines to give to `rotate`.

        An integer T means positions 0..T-1 and gives `(T, 1, head_dim)`; a tensor `(batch, T)` of positions gives
        `(batch, T, 1, head_dim)`.
        """
        if isinstance(positions, int):
            return self.cos[:positions, None], self.sin[:positions, None]
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of every pair of channels: `(head_dim / 2,)` in float64 on the CPU.

    With `scaling` they are Llama 3's (Grattafiori et al., 2024): slow ones divided by the factor, fast ones as they
    are. Those between, told by how often they turn in the original context, are a mean of the two.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = theta ** (-channels / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of channels (i, i + head_dim / 2) of `x` `(batch, T, heads, head_dim)` by its position's angle."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
