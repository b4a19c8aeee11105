"""Automatic mixed precision: which type the matrix products run in, and fp16's loss scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from config.errors import UserError
from model.devices import DTYPES, automatic_precision


class Precision:
    """Weights stay float32; with bf16 or fp16, `autocast()` runs the matrix products in that type.

    `auto` is bf16 where the device has fast instructions for it, else fp16 on a GPU and fp32 elsewhere.

    `scaler` is PyTorch's GradScaler: it keeps fp16's small gradients from vanishing, and does nothing otherwise.
    """

    def __init__(self, name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> None:
        self.device = device
        self.name = automatic_precision(device) if name == "auto" else name
        self.dtype = DTYPES[self.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    @property
    def mixed(self) -> bool:
        """Whether matrix products run in another type than the weights."""
        return self.dtype != torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """The context that a forward pass runs in."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.mixed)


def require_float8(precision: Precision) -> None:
    """`UserError` unless the device multiplies in 8 bits, and all that does not in bfloat16."""
    device = precision.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            "training.fp8=true needs a GPU with 8-bit matrix products (NVIDIA's Ada, Hopper or later), and this is "
            "none. Set training.fp8=false."
        )
    if precision.name != "bf16":
        raise UserError(f"training.fp8=true goes with training.precision=bf16, not with {precision.name}.")
