"""The layer of `peft` that adapters are made of, with DoRA's forward pass such that `torch.compile` takes it whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


class AdaptedLinear(Linear):
    """`peft`'s LoRA beside a frozen linear layer, quantized or not."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """What a configuration may ask for besides plain LoRA."""
        return {(): None, ("use_dora",): Dora}


class Dora(DoraLinearVariant):
    """DoRA (Liu et al., 2024, https://arxiv.org/abs/2402.09353), as in `peft`.

    There the low-rank product goes through an identity matrix as wide as the layer, and the type of the weights is
    looked up in a way that breaks the graph.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """`result` `(..., out)` of the frozen layer, with its weights W and what the adapter adds made W' = m W/|W|."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        weight: Tensor
        base, magnitude = module.get_base_layer(), module.lora_magnitude_vector[active_adapter].weight
        with torch.no_grad():
            weight = base.weight
            lengths = torch.linalg.norm(weight + scaling * (up.weight @ down.weight), dim=1)
        factor = magnitude / lengths
        if isinstance(dropout, nn.Identity) or not module.training:
            plain = result if base.bias is None else result - base.bias
        else:
            x = dropout(x)
            plain = F.linear(x, weight)
        adapted: Tensor = result + (factor - 1) * plain + factor * scaling * up(down(x))
        return adapted
