"""Initial weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from config.model import ModelConfig
from model.sharding import fill


class NoDefaultInit(TorchFunctionMode):
    """Within it, PyTorch's modules are built without initial weights, which `initialise` would only replace.

    On the meta device that also saves a second: the default initialisation would load PyTorch's compiler there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let every function through but those of `torch.nn.init`, which give back their tensor as it is."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model`, as a function of (seed, name of the parameter, shape) alone.

    Matrices are normal with deviation `init_std`; those that write to the residual stream are divided by
    sqrt(2 * n_layers) (Radford et al., 2019), or start at zero with `zero_init_projections`. Scales are one; biases,
    gates, the scales of the embedding that is added again, and the rows that pad the vocabulary are zero. The numbers
    are drawn on the CPU, so every device gets the same ones, and every process its part of them where the model is
    sharded.
    """
    projection_std = 0.0 if config.zero_init_projections else config.init_std / math.sqrt(2 * config.n_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".residual_scale")):
            parameter.fill_(1.0)
        elif name.endswith((".bias", ".value_gate.weight", ".embedding_scale")):
            parameter.zero_()
        elif name.endswith((".output.weight", ".down.weight")):
            _fill_normal(parameter, projection_std, name, seed)
        elif name.endswith((".query.weight", ".key.weight", ".value.weight", ".up.weight", ".gate.weight")):
            _fill_normal(parameter, config.init_std, name, seed)
        elif name == "position_embedding.weight":
            _fill_normal(parameter, config.init_std, name, seed)
        elif name in ("token_embedding.weight", "head.weight") or name.startswith("value_embeddings."):
            _fill_normal(parameter, config.init_std, name, seed, rows=config.vocab_size)
        else:
            raise ValueError(f"no rule initialises the parameter {name}")


def _fill_normal(parameter: nn.Parameter, std: float, name: str, seed: int, rows: int | None = None) -> None:
    """Normal numbers in the first `rows` rows, all by default, and zero in the others."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
    drawn = torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
    if rows is not None:
        drawn[rows:] = 0.0
    fill(parameter, drawn)
