"""Adapters: small matrices trained beside the frozen ones of a model, by `peft`.

LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) adds to a matrix W the product of two thin ones, B A, scaled by
alpha / rank. DoRA also learns the length of each row of the sum. As QLoRA does, the frozen matrices may be stored in
eight or four bits meanwhile.

A checkpoint holds the weights with the adapter merged into them, under their plain names, so whoever reads it need know
nothing of adapters; and beside them the adapter alone, from which, with the weights it began with, a run goes on.
Where those were quantized, the merged weights are what the numbers stand for plus what the adapter adds, so they are
the model whose loss was measured.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.training import AdapterConfig
from model.quantized import Kind, QuantizedLinear
from model.transformer import Transformer

MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
NAME = "default"  # by which peft knows the adapter


def adapt(model: Transformer, adapter: AdapterConfig, seed: int) -> None:
    """Freeze `model` and put an adapter beside its matrices, in place; at first it changes nothing.

    The adapter's first weights are a function of `seed`. Not for a model that is sharded.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from training.adapted_linear import AdaptedLinear

    matrices = [name for name, module in model.blocks.named_modules(prefix="blocks") if _is_matrix(name, module)]
    wanted = MATRICES if adapter.targets == "all" else adapter.targets
    if adapter.quantize is not None:
        _quantize(model, matrices, adapter.quantize)
    asked = LoraConfig(
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),
        lora_dropout=adapter.dropout,
        use_dora=adapter.method == "dora",
        target_modules=[name for name in matrices if name.rpartition(".")[2] in wanted],
    )
    asked._register_custom_module({nn.Linear: AdaptedLinear, QuantizedLinear: AdaptedLinear})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # the quantized one, which has all that is needed
        torch.manual_seed(seed)
        inject_adapter_in_model(asked, model, NAME)


def _is_matrix(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in MATRICES


def _quantize(model: nn.Module, names: list[str], kind: Kind) -> None:
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = cast(nn.Linear, model.get_submodule(name))
        setattr(model.get_submodule(parent), own, QuantizedLinear(layer.weight, layer.bias, kind))


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` has an adapter."""
    return hasattr(model, "peft_config")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter, which are all that is trained, by the names of the matrices they lie beside."""
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return {name.replace(f".{NAME}", ""): value.detach() for name, value in trained}


def weights_state(model: Transformer) -> dict[str, Any]:
    """What a checkpoint holds of the weights: all by their plain names, and the adapter alone where there is one."""
    if not is_adapted(model):
        return {"model": model.state_dict()}
    return {"model": merged_weights(model), "adapter": adapter_tensors(model)}


@torch.no_grad()
def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights of a plain model that computes what the adapted `model` does, up to rounding."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (LoraLayer, QuantizedLinear)) and not name.endswith(".base_layer")
    }
    inside = tuple(f"{name}." for name in layers)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        weights[f"{name}.weight"] = _merged(layer) if isinstance(layer, LoraLayer) else layer.weight
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.detach()
    return weights


def _merged(layer: Any) -> Tensor:
    """The weights `(out, in)` of a linear layer with its adapter."""
    weight: Tensor = layer.get_base_layer().weight + layer.get_delta_weight(NAME)
    if NAME in layer.lora_magnitude_vector:
        lengths = torch.linalg.norm(weight, dim=1, keepdim=True)
        weight = weight * (layer.lora_magnitude_vector[NAME].weight[:, None] / lengths)
    return weight


@torch.no_grad()
def load_adapter(model: Transformer, state: dict[str, Any], path: Path) -> None:
    """Copy the adapter of the checkpoint `state`, read from `path`, into the adapted `model`."""
    own, saved = adapter_tensors(model), state.get("adapter", {})
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
        raise UserError(
            f"{path} holds another adapter than training.adapter describes. Leave those settings as they were."
        )
    for name, value in saved.items():
        own[name].copy_(value)


def describe(model: Transformer, adapter: AdapterConfig) -> str:
    """A line about what is trained."""
    trained = sum(value.numel() for value in adapter_tensors(model).values())
    stored = f", their matrices in {adapter.quantize}" if adapter.quantize else ""
    return (
        f"{adapter.title} of rank {adapter.rank}: {trained:,} weights are trained, "
        f"{model.num_parameters() - trained:,} stay as they are{stored}."
    )
