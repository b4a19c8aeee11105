"""Tensor parallelism: neighbours slice the matrices of every block among them, and work on the same rows of data.

As in Megatron-LM (Shoeybi et al., 2019): the first matrices of a pair (query, key, value; up, gate) are cut by their
outputs, so that each process has some of the heads, or of the hidden units, and the second (output; down) by its
inputs, so that a sum over the processes completes it: two sums forward and two backward for each block. Embeddings,
norms and the head are the same on all of them.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from model.transformer import Transformer

CUT_BY_OUTPUTS = ("attention.query", "attention.key", "attention.value", "feed_forward.up", "feed_forward.gate")
CUT_BY_INPUTS = ("attention.output", "feed_forward.down")


def slice_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Slice the matrices of the blocks of `model`, on the meta device or a real one, over the axis `tensor`."""
    for block in model.blocks:
        there = dict(block.named_modules())
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in CUT_BY_OUTPUTS if name in there}
        plan |= {name: RowwiseParallel() for name in CUT_BY_INPUTS}
        parallelize_module(block, mesh["tensor"], plan)
