"""Initial weights."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from config.schema import ModelConfig


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model`, as a function of (seed, name of the parameter, shape) alone.

    Matrices are normal with deviation `init_std`; those that write to the residual stream are divided by
    sqrt(2 * n_layers) (Radford et al., 2019), or start at zero with `zero_init_projections`. Scales are one; biases and
    the rows that pad the vocabulary are zero. The numbers are drawn on the CPU, so every device gets the same ones.
    """
    projection_std = 0.0 if config.zero_init_projections else config.init_std / math.sqrt(2 * config.n_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        elif name.endswith((".output.weight", ".down.weight")):
            _fill_normal(parameter, projection_std, name, seed)
        elif name.endswith((".query.weight", ".key.weight", ".value.weight", ".up.weight", ".gate.weight")):
            _fill_normal(parameter, config.init_std, name, seed)
        elif name == "position_embedding.weight":
            _fill_normal(parameter, config.init_std, name, seed)
        elif name in ("token_embedding.weight", "head.weight"):
            _fill_normal(parameter, config.init_std, name, seed)
            parameter[config.vocab_size :] = 0.0
        else:
            raise ValueError(f"no rule initialises the parameter {name}")


def _fill_normal(parameter: nn.Parameter, std: float, name: str, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
    parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
