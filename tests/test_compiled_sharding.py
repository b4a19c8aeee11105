"""A compiled model that is shared by processes, over gloo on the CPU: what the eager one learns, in as few graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_sharded_training import run_processes

COMPILED_RUNS = """
from functools import partial

import torch
from torch._dynamo.utils import counters

from model.cache import KVCache
from tests.small_runs import small_config
from training.distributed import open_process
from training.layout import make_layout
from training.optimizers import make_optimizers
from training.parallelism import aside, deal, micro_batch, parallelise
from training.precision import Precision
from training.setup import new_model
from training.shares import take_gradients

torch.compile = partial(torch.compile, backend="aot_eager")  # all of a compiled step but its kernels
with open_process("cpu") as process:
    precision = Precision("fp32", process.device)
    config = small_config("training.parallelism=fsdp", "model.zero_init_projections=false", "training.optimizer=adamw")
    layout = make_layout(config, process.world_size)
    spread = partial(deal, layout=layout, process=process, precision=precision)
    models = [new_model(config, process.device, spread) for _ in range(2)]
    forwards = [parallelise(model, layout, compiling) for model, compiling in zip(models, (False, True))]
    optimizers = [make_optimizers(model, config.training, layout=layout) for model in models]
    graphs = []
    for step in range(4):
        tokens = torch.randint(0, 100, (4, 33), generator=torch.Generator().manual_seed(2 * step + process.rank))
        for model, forward, optimizer in zip(models, forwards, optimizers):
            for rows in (slice(0, 2), slice(2, 4)):
                with micro_batch(forward, last=rows.stop == 4):
                    (forward(tokens[rows, :-1], tokens[rows, 1:]) / 256).backward()
            take_gradients(optimizer.shares)
            optimizer.step(torch.tensor(False))
            optimizer.zero_grad()
            with aside(model), torch.no_grad():
                model.eval()
                model(tokens[:, :20], tokens[:, 1:21])
                model.next_logits(tokens[:, : 3 + step], KVCache(config.model, 4), torch.tensor([2, 2, 2, 2]))
                model.train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2] * 4, graphs  # both blocks are one graph in training, one in evaluation, and none generates
    for wanted, found in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(found.to_local(), wanted.to_local(), rtol=1e-5, atol=1e-6)
    moved = models[1].blocks[0].attention.query.weight.to_local()
    assert not torch.equal(moved, new_model(config, process.device, spread).blocks[0].attention.query.weight.to_local())
"""


@pytest.mark.slow
def test_compiled_shards_learn_what_eager_ones_do_and_are_compiled_once(tmp_path: Path) -> None:
    """With accumulation, and an evaluation and generation between the steps."""
    run_processes(tmp_path, 2, COMPILED_RUNS)
