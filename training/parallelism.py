"""From a model on paper to one that all processes train: dealt out, compiled, its gradients summed over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.attention import Shared
from model.lookup import use_exact_lookups
from model.transformer import Transformer
from training.distributed import Process
from training.layout import Layout
from training.precision import Precision
from training.setup import compiled


def deal(model: Transformer, layout: Layout, process: Process, precision: Precision) -> None:
    """Shard `model` in place where `layout` says so; on the meta device it is then still to be materialised."""
    if layout.shares_weights:
        from training.sharding import make_mesh, shard

        mesh = make_mesh(layout, process.device)
        if layout.tensor > 1:
            from training.tensor_parallel import slice_matrices

            slice_matrices(model, mesh)
        shard(model, mesh, precision)


def parallelise(model: Transformer, layout: Layout, compiling: bool) -> nn.Module:
    """What to call for a forward pass whose backward pass leaves the gradients of the whole batch.

    With `compiling` it is one graph, or, where the model is sharded, one for each block.
    """
    if layout.shares_weights:
        if compiling:
            model.blocks_compiled = True
            for block in model.blocks:
                block.forward = _compiled_in_training(block.forward)
        return model
    if compiling:
        use_exact_lookups(model)
    forward = compiled(model) if compiling else model
    if layout.data_size == 1:
        return forward
    return DistributedDataParallel(forward, forward_sync_buffers=False, gradient_as_bucket_view=True)


def _compiled_in_training(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward pass of a block, compiled but for generation, whose shapes change with every token."""
    fast = compiled(plain)

    def forward(x: Tensor, shared: Shared, value_embedding: Tensor | None = None) -> Tensor:
        return (fast if shared.cache is None else plain)(x, shared, value_embedding)

    return forward


def averaged_over(forward: nn.Module) -> int:
    """By how much the summed gradients are divided: DistributedDataParallel averages over the processes."""
    return forward.process_group.size() if isinstance(forward, DistributedDataParallel) else 1


@contextmanager
def micro_batch(forward: nn.Module, last: bool) -> Iterator[None]:
    """The context of one micro-batch: only the last one of a step need exchange gradients."""
    if isinstance(forward, DistributedDataParallel):
        if not last:
            with forward.no_sync():
                yield
            return
    elif hasattr(forward, "set_requires_gradient_sync"):
        from training.sharding import set_last_micro_batch

        set_last_micro_batch(forward, last)
    yield


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Forward passes inside have no backward pass; what they leave gathered of a sharded model is freed."""
    yield
    if hasattr(model, "reshard"):
        from training.sharding import drop_gathered

        drop_gathered(model)
