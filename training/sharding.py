"""Fully sharded data parallelism (FSDP2): each process keeps a part of every parameter, gradient and moment.

Every block is a unit of its own, and what is left (embeddings, last norm, head) is the root. Going forward, a unit's
parameters are gathered while the unit before it computes, and dropped behind it; going backward the same once more, and
its gradients are summed into the shards that own them. `hsdp` does this within groups of processes and sums the
gradients over the groups.

Two things keep the numbers those of one device: nothing is averaged (the loss is already divided by the count of the
whole batch), and gradients are summed in float32. Blocks are gathered in the type of their matrix products, which
autocast would cast them to anyway; the root, which makes the residual stream, in float32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from model.transformer import Transformer
from training.layout import Layout
from training.precision import Precision

AXES = ("replicate", "shard", "tensor")


def make_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The processes of the run in the order of `layout`, with an axis for each of its numbers."""
    return init_device_mesh(device.type, (layout.replicate, layout.shard, layout.tensor), mesh_dim_names=AXES)


def shard(model: Transformer, mesh: DeviceMesh, precision: Precision) -> None:
    """Deal the parameters of `model`, on the meta device or a real one, in place.

    Made on the meta device, it then takes `to_empty`, and `init_weights` or `load_weights`, which write each process's
    part.
    """
    data = mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]
    in_blocks = MixedPrecisionPolicy(
        param_dtype=precision.dtype if precision.mixed else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    in_root = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=data, mp_policy=in_blocks)
    fully_shard(model, mesh=data, mp_policy=in_root)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    layers = units(model.blocks)
    for layer, following in zip(layers, layers[1:], strict=False):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    register_fsdp_forward_method(model, "next_logits")


def units(model: nn.Module) -> list[FSDPModule]:
    """The parts of `model` that are gathered as one, itself among them; none where it is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Before each micro-batch: its gradients are summed into the shards, over the groups in the last one alone.

    So no process ever holds more than its part of them, but for those of a block at work. The root's parameters, which
    are there at the peak anyway, stay gathered between micro-batches.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last, recurse=False)


def drop_gathered(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered."""
    for unit in units(model):
        unit.reshard()
