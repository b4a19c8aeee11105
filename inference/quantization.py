"""The weights of a model in eight or four bits: less to read per token, for a little accuracy."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from model.quantized import QuantizedLinear
from model.transformer import Transformer

Quantize = Literal["none", "int8", "int4"]


def quantize_(model: Transformer, kind: Quantize) -> None:
    """Store the matrices of `model` in eight or four bits, in place; it can then no longer be trained.

    Embeddings, norms, biases and gates stay as they are. The output matrix, which is the most sensitive, has eight bits
    either way.
    """
    if kind == "none":
        return
    head, model.head = model.head, None
    output = model.token_embedding.weight if head is None else head.weight
    blocks: list[Any] = list(model.blocks)
    for parent in [module for block in blocks for module in (block.attention, block.feed_forward)]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name != "value_gate":
                setattr(parent, name, QuantizedLinear(layer.weight, layer.bias, kind))
    setattr(model, "head", QuantizedLinear(output, None, "int8"))
