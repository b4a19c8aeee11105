"""Tensor parallelism: neighbours slice every large matrix among them, and work on the same rows of data.

As in Megatron-LM (Shoeybi et al., 2019): the first matrices of a pair (query, key, value; up, gate) are cut by their
outputs, so that each process has some of the heads, or of the hidden units, and the second (output; down) by its
inputs, so that a sum over the processes completes it: two sums forward and two backward for each block. Value
embeddings and their gates go with the heads. Token embedding and head are cut by words: one more sum forward makes
vectors of tokens, and the loss never has more than a process's own words of the logits (see `model.loss`). Norms,
learned positions and what scales the residual stream are the same on all processes; so are learned scales of queries
and keys, of which each process finds the gradient for its own heads, and these are summed.

So is the residual stream, and with it what dropout leaves of it: neighbours draw the same random numbers, but for the
shares of attention, of which each has those of its own heads.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from model.transformer import Block, Transformer

PARTS: dict[str, ParallelStyle] = {
    "token_embedding": RowwiseParallel(input_layouts=Replicate()),
    "value_embeddings.*": ColwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
PARTS_OF_BLOCK: dict[str, ParallelStyle] = {
    "attention": PrepareModuleInput(
        input_layouts=(Replicate(), None, None), desired_input_layouts=(Replicate(), None, None)
    ),
    "attention.query": ColwiseParallel(),
    "attention.key": ColwiseParallel(),
    "attention.value": ColwiseParallel(),
    "attention.value_gate": ColwiseParallel(),
    "attention.output": RowwiseParallel(),
    "feed_forward": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
    "feed_forward.up": ColwiseParallel(),
    "feed_forward.gate": ColwiseParallel(),
    "feed_forward.down": RowwiseParallel(),
}


def slice_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Slice the matrices of `model`, on the meta device or a real one, over the axis `tensor`."""
    tensor = mesh["tensor"]
    _slice(model, PARTS, tensor)
    for block in model.blocks:
        assert isinstance(block, Block)
        _slice(block, PARTS_OF_BLOCK, tensor)
        block.attention.slice = tensor.get_local_rank()
        for norm in (block.attention.query_norm, block.attention.key_norm):
            if norm is not None:
                norm.mesh = tensor


def _slice(module: nn.Module, plan: dict[str, ParallelStyle], mesh: DeviceMesh) -> None:
    there = dict(module.named_modules())
    parallelize_module(module, mesh, {name: how for name, how in plan.items() if there.get(name.removesuffix(".*"))})
