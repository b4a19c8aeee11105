"""Matrices sliced among processes, over gloo on the CPU: the same training as on one device, option by option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.errors import UserError
from tests.small_runs import small_config
from tests.test_sharded_training import run_processes
from training.setup import should_compile

SLICED_RUNS = """
from dataclasses import replace
from functools import partial

import torch

import model.attention
import model.loss
import training.muon
from model.cache import KVCache
from model.transformer import Transformer
from tests.small_runs import small_config
from training import randomness
from training.distributed import open_process
from training.layout import make_layout
from training.optimizers import make_optimizers
from training.parallelism import deal, parallelise
from training.precision import Precision
from training.setup import new_model
from training.shares import take_gradients

HEADS, ROWS = 4, 4
VOCABULARY = 130  # of 256 rows: the last slices hold little or nothing of it
LOGITS = ["model.logit_soft_cap=2", "training.z_loss=0.01"]
SCALES = ["model.qk_norm=learned"]
MATRICES = ["model.value_embeddings=all", "model.tie_embeddings=false", "model.activation=swiglu", "model.bias=true"]
DROPOUT = ["model.dropout=0.3", "training.gradient_checkpointing=full"]
WAYS = {
    2: [["training.tensor_parallel=2", *LOGITS, *MATRICES, *SCALES]],
    4: [
        ["training.parallelism=fsdp", "training.tensor_parallel=2", *LOGITS, *MATRICES, *SCALES],
        ["training.parallelism=ddp", "training.tensor_parallel=2", *DROPOUT],
        ["training.tensor_parallel=4", "model.d_head=6", *LOGITS],
    ],
}
training.muon.has_fast_bfloat16 = lambda device: False
model.loss.CPU_CHUNK = 50
attend = model.attention.attend


def attend_by_slices(query, key, value, mask, dropout):
    "On one device, the random numbers of as many slices as there are."
    if query.shape[1] < HEADS or dropout == 0.0:
        return attend(query, key, value, mask, dropout)
    seed, mixed = int(torch.randint(2**62, ())), []
    for number, parts in enumerate(zip(*(tensor.chunk(layout.tensor, 1) for tensor in (query, key, value)))):
        with torch.random.fork_rng():
            torch.manual_seed(seed + number)
            mixed.append(attend(*parts, mask, dropout))
    return torch.cat(mixed, 1)


def share_of(rank):
    size = ROWS // layout.data_size
    return slice(rank * size, (rank + 1) * size)


def loss_of(model, x, y, step, rank):
    randomness.seed_step(0, step, rank)
    rows = share_of(rank)
    loss = model(x[rows], y[rows]) / (y != -100).sum()
    loss.backward()
    return loss.detach()


model.attention.attend = attend_by_slices
with open_process("cpu") as joined:
    precision = Precision("fp32", joined.device)
    for way in WAYS[joined.world_size]:
        own = ["model.zero_init_projections=false", f"model.n_heads={HEADS}", "training.optimizer=muon"]
        config = small_config(*way, *own, vocab_size=VOCABULARY)
        process = replace(joined, tensor=config.training.tensor_parallel)
        layout = make_layout(config, process.world_size)
        alone = Transformer(config.model)
        alone.init_weights(config.training.seed)
        spread = partial(deal, layout=layout, process=process, precision=precision)
        sliced = new_model(config, process.device, spread)
        held = sum(parameter.to_local().numel() for name, parameter in sliced.named_parameters() if "norm" not in name)
        assert held < 1.1 * sum(parameter.numel() for parameter in alone.parameters()) / layout.shard / layout.tensor
        for each in (alone, sliced):
            each.z_loss = config.training.z_loss
            each.set_gradient_checkpointing(config.training.gradient_checkpointing)
        optimizers = [make_optimizers(alone, config.training), make_optimizers(sliced, config.training, layout=layout)]
        forward = parallelise(sliced, layout, compiling=False)
        for step in range(10):
            tokens = torch.randint(0, VOCABULARY, (ROWS, 33), generator=torch.Generator().manual_seed(step))
            x, y = tokens[:, :-1], tokens[:, 1:].clone()
            y[0, 3:20], y[3] = -100, -100
            wanted = sum(loss_of(alone, x, y, step, rank) for rank in range(layout.data_size))
            found = process.sum_(loss_of(forward, x, y, step, process.data_rank))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            for each in optimizers:
                take_gradients(each.shares)
                each.step(torch.tensor(False))
                each.zero_grad()
        for (name, wanted), found in zip(alone.named_parameters(), sliced.parameters(), strict=True):
            torch.testing.assert_close(found.full_tensor(), wanted, rtol=1e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")

        alone.eval(), sliced.eval()
        with torch.no_grad():
            torch.testing.assert_close(forward(x), alone(x), rtol=1e-4, atol=1e-4)
            caches = [KVCache(config.model, ROWS), KVCache(config.model, ROWS)]
            for ids, last in ((x[:, :9], torch.tensor([8, 8, 8, 8])), (x[:, 9:10], torch.tensor([0, 0, 0, 0]))):
                logits = [each.next_logits(ids, cache, last) for each, cache in zip((sliced, alone), caches)]
                torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_option_learns_and_answers_as_on_one_device(tmp_path: Path, processes: int) -> None:
    """Ten steps, then logits with a cache and without; dropout too, where one device draws what the slices draw."""
    run_processes(tmp_path, processes, SLICED_RUNS)


def test_what_draws_random_numbers_by_slices_is_not_compiled() -> None:
    settings = ["training.tensor_parallel=2", "model.dropout=0.1"]
    assert not should_compile(small_config(*settings), torch.device("cuda"))
    assert should_compile(small_config(settings[0]), torch.device("cuda"))
    with pytest.raises(UserError, match="training.compile=true does not go with model.dropout"):
        should_compile(small_config(*settings, "training.compile=true"), torch.device("cuda"))
