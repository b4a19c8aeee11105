"""Weights dealt to several processes, over gloo on the CPU: the same training as on one device."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from config.errors import UserError
from model.checkpoint import load_model
from model.checkpoint_folder import latest_checkpoint
from tests.commands import here
from tests.small_runs import SMALL, TRAIN, command, curve, small_config, write_corpus
from tests.test_distributed import MASKED_RUN, TWO, masked_run, run_python
from training.layout import Layout, make_layout

# AdamW makes whole steps of rounding errors where a gradient is next to nothing; a larger eps keeps them small.
TEN_STEPS = ["training.max_steps=10", "training.adamw.eps=1e-6"]
SETTINGS = [*SMALL, "training.checkpoint_interval=3", "training.optimizer=adamw"]

INITIAL_WEIGHTS = """
import torch
from functools import partial
from tests.small_runs import new_transformer, small_config
from training.distributed import open_process
from training.layout import make_layout
from training.parallelism import deal
from training.precision import Precision
from training.setup import new_model

config = small_config("training.parallelism=hsdp", "training.shard_group=3")
with open_process("cpu") as process:
    layout = make_layout(config, process.world_size)
    spread = partial(deal, layout=layout, process=process, precision=Precision("fp32", process.device))
    model = new_model(config, process.device, spread)
    whole = new_transformer().state_dict()
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.4 * sum(value.numel() for value in whole.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), whole[name]), name
"""

DEALT_MUON = """
from functools import partial
import torch
import training.muon
from model.sharding import fill
from tests.small_runs import new_transformer, small_config
from training.distributed import open_process
from training.layout import make_layout
from training.optimizers import make_optimizers
from training.parallelism import deal
from training.precision import Precision
from training.setup import new_model
from training.shares import take_gradients

training.muon.has_fast_bfloat16 = lambda device: False
MODEL = ["model.d_ff=50", "model.zero_init_projections=false"]
SETTINGS = [*MODEL, "training.muon.second_moment=0.9", "training.muon.weight_decay=0.1"]
WAYS = [
    ["training.parallelism=ddp"],
    ["training.parallelism=fsdp"],
    ["training.parallelism=hsdp", "training.shard_group=2"],
    ["training.parallelism=fsdp", "training.tensor_parallel=2"],
    ["training.parallelism=ddp", "training.tensor_parallel=2"],
]

with open_process("cpu") as process:
    precision = Precision("fp32", process.device)
    for way in WAYS:
        config = small_config(*SETTINGS, *way)
        layout = make_layout(config, process.world_size)
        alone = new_transformer(*MODEL)
        together = new_model(config, process.device, partial(deal, layout=layout, process=process, precision=precision))
        one = make_optimizers(alone, config.training)
        many = make_optimizers(together, config.training, layout=layout)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for left, right in zip(alone.parameters(), together.parameters(), strict=True):
                left.grad = torch.randn(left.shape, generator=generator)
                right.grad = torch.zeros_like(right)
                fill(right.grad, left.grad)
            take_gradients(many.shares)
            one.step(torch.tensor(step == 1))
            many.step(torch.tensor(step == 1))
        before = new_transformer(*MODEL)
        for old, left, right in zip(*(model.parameters() for model in (before, alone, together)), strict=True):
            whole = right.full_tensor() if layout.shares_weights else right
            torch.testing.assert_close(whole, left, rtol=1e-5, atol=1e-5)
            assert not torch.equal(left, old)
        states = [optimizers.parts["muon"].state_dict()["state"] for optimizers in (one, many)]
        torch.testing.assert_close(*([state[key]["second_moment"] for key in sorted(state)] for state in states))
"""

HELD_GRADIENTS = """
import gc
import sys
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from tests.small_runs import small_config
from training.distributed import open_process
from training.layout import make_layout
from training.parallelism import deal, micro_batch
from training.precision import Precision
from training.setup import new_model

def held():
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not isinstance(each, DTensor)]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())

config = small_config(*sys.argv[1:], "model.n_layers=6", "model.zero_init_projections=false")
with open_process("cpu") as process:
    layout = make_layout(config, process.world_size)
    spread = partial(deal, layout=layout, process=process, precision=Precision("fp32", process.device))
    model = new_model(config, process.device, spread)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    root = whole - sum(parameter.nbytes for parameter in model.blocks.parameters())
    tokens = torch.randint(0, 100, (3, 2, 33), generator=torch.Generator().manual_seed(process.rank))
    before = held()
    for part in tokens[:2]:
        with micro_batch(model, last=False):
            model(part[:, :-1], part[:, 1:]).backward()
        grown = held() - before
        assert grown < 0.6 * whole + root, (grown, whole, root)
    with micro_batch(model, last=True):
        model(tokens[2, :, :-1], tokens[2, :, 1:]).backward()
    assert 0.4 * whole < held() - before < 0.6 * whole
"""


class TestLayout:
    def test_deals_processes_to_copies_and_shards(self) -> None:
        assert make_layout(small_config(), 8) == Layout(replicate=8)
        assert make_layout(small_config("training.parallelism=fsdp"), 8) == Layout(shard=8)
        hybrid = small_config("training.parallelism=hsdp", "training.shard_group=2")
        assert make_layout(hybrid, 8) == Layout(replicate=4, shard=2)
        assert make_layout(hybrid, 1) == Layout()

    def test_a_group_is_a_machine_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert make_layout(small_config("training.parallelism=hsdp"), 8) == Layout(replicate=2, shard=4)

    def test_a_group_that_does_not_divide(self) -> None:
        with pytest.raises(UserError, match="shard_group=3 does not divide the 8 shares"):
            make_layout(small_config("training.parallelism=hsdp", "training.shard_group=3"), 8)

    def test_a_group_where_there_are_none(self) -> None:
        with pytest.raises(UserError, match="shard_group is of training.parallelism=hsdp"):
            make_layout(small_config("training.parallelism=fsdp", "training.shard_group=2"), 8)

    def test_slices_need_whole_heads(self) -> None:
        sliced = small_config("training.parallelism=fsdp", "training.tensor_parallel=2")
        assert make_layout(sliced, 8) == Layout(shard=4, tensor=2)
        with pytest.raises(UserError, match="tensor_parallel=4 does not divide model.n_heads=2"):
            make_layout(small_config("training.tensor_parallel=4"), 8)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `one` of one process."""
    folder = tmp_path_factory.mktemp("one_device")
    with contextlib.chdir(folder):
        masked_run("training.checkpoint_dir=one", "training.run_name=one", *TEN_STEPS)
    return folder


@pytest.mark.slow
class TestSharded:
    def test_begins_with_the_weights_of_one_device(self, tmp_path: Path) -> None:
        """Uneven shards, some of them empty."""
        run_processes(tmp_path, 3, INITIAL_WEIGHTS)

    def test_muon_deals_matrices_and_moves_them_as_on_one_device(self, tmp_path: Path) -> None:
        """Data parallel, sharded, in groups, and sliced; neither matrices nor their parts come out even."""
        run_processes(tmp_path, 4, DEALT_MUON)

    @pytest.mark.parametrize(
        ("processes", "settings"),
        [
            (2, ["training.parallelism=fsdp", "training.micro_batch_size=2"]),
            (4, ["training.parallelism=hsdp", "training.shard_group=2", "training.micro_batch_size=1"]),
            (4, ["training.parallelism=fsdp", "training.tensor_parallel=2", "training.micro_batch_size=2"]),
        ],
    )
    def test_learns_what_one_device_does(
        self, one_device: Path, request: pytest.FixtureRequest, processes: int, settings: list[str]
    ) -> None:
        """Promises 3 and 4: accumulation, and counts of valid tokens that differ between processes."""
        name = request.node.callspec.id
        own = [f"training.checkpoint_dir={name}", f"training.run_name={name}", *TEN_STEPS]
        run_processes(one_device, processes, MASKED_RUN, *own, *settings)
        assert_same_run(one_device, "one", name)

    @pytest.mark.parametrize("settings", [["parallelism=fsdp"], ["parallelism=hsdp", "training.shard_group=2"]])
    def test_no_process_holds_whole_gradients_between_micro_batches(self, tmp_path: Path, settings: list[str]) -> None:
        """Two shards: half of the gradients, and of the weights those of the root, which stay gathered."""
        run_processes(tmp_path, 2 * len(settings), HELD_GRADIENTS, f"training.{settings[0]}", *settings[1:])

    def test_one_run_on_one_two_four_and_one_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files and folders alike are taken by any number of processes, sliced or sharded; the curve stays that of one
        device, and both write sample texts."""
        monkeypatch.chdir(tmp_path)
        write_corpus(tmp_path)
        settings = [*SETTINGS, "training.schedule.name=constant", "training.run_name=run"]
        settings += ["model.value_embeddings=alternate", "model.tie_embeddings=false"]
        here(tmp_path, TRAIN, *settings, "training.max_steps=12", "training.checkpoint_dir=whole")
        Path("runs/run").rename("runs/whole")
        here(tmp_path, TRAIN, *settings, "training.max_steps=3", "training.checkpoint_dir=run")

        two = [*TWO, "training.tensor_parallel=2", "training.micro_batch_size=2", "training.sample_interval=3"]
        command(tmp_path, "distributed_train", *two, "--resume", "run", "training.max_steps=6")
        shown = here(tmp_path, "scripts/eval.py", "--checkpoint", "run/model_step_6", "--json").stdout
        assert json.loads(shown)["loss"] < math.log(256)

        four = ["--gpus", "4", "--device", "cpu", "training.parallelism=hsdp", "training.shard_group=2"]
        four += ["training.tensor_parallel=1", "training.micro_batch_size=1", "training.sample_interval=3"]
        command(tmp_path, "distributed_train", *four, "--resume", "run", "training.max_steps=9")
        samples = [json.loads(line) for line in Path("runs/run/samples.jsonl").read_text().splitlines()]
        assert [sample["step"] for sample in samples] == [6, 9]
        assert all(len(sample["text"]) > 10 for sample in samples)
        assert latest_checkpoint(Path("run")) == Path("run/model_step_9") and Path("run/model_step_9").is_dir()
        here(tmp_path, TRAIN, "--resume", "run/model_step_9", "training.max_steps=12")
        assert Path("run/model_step_12.pt").is_file()
        assert_same_run(tmp_path, "whole", "run")


def run_processes(folder: Path, processes: int, program: str, *arguments: str) -> None:
    """Run `program` in `folder` as so many processes."""
    script = folder / "program.py"
    script.write_text(program)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run_python(folder, *launcher, str(script), *arguments)


def assert_same_run(folder: Path, one: str, other: str, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Two runs with checkpoints of these names ended in the same weights, and lost the same on the way."""
    weights = [load_model(latest_checkpoint(folder / name))[0].state_dict() for name in (other, one)]
    torch.testing.assert_close(*weights, rtol=rtol, atol=atol)
    curves: list[list[tuple[Any, ...]]] = [curve(folder / "runs" / name) for name in (other, one)]
    for row, wanted in zip(*curves, strict=True):
        assert [value or 0 for value in row] == pytest.approx([value or 0 for value in wanted], rel=1e-4)
