"""Checkpoints that are folders: read without executing anything, and not where they are damaged."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from config.errors import UserError
from model.checkpoint import load_checkpoint, load_model, save_checkpoint
from model.checkpoint_folder import Keep, list_checkpoints, prune, resolve_checkpoint
from tests.small_runs import new_transformer, small_config
from training.console import Console
from training.distributed import Process
from training.record import Record
from training.sharded_saving import ShardedSaving


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder that a sharded run of one process leaves for step 5."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    weights = {
        name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in new_transformer().state_dict().items()
    }
    config = small_config(f"training.checkpoint_dir={tmp_path}", f"training.runs_dir={tmp_path}/runs")
    record = Record(config, tmp_path / "runs/run", Console(enabled=False), {})
    saving = ShardedSaving(config.training, Process(0, 1, torch.device("cpu")), record, print)
    assert saving.save({"model": weights, "step": 5, "validation_loss": None}, final=True) is None
    saving.close()
    record.close()
    dist.destroy_process_group()
    yield tmp_path / "model_step_5"


class TestFolder:
    def test_is_taken_as_a_file_is(self, folder: Path) -> None:
        model, info = load_model(folder)
        assert (info.step, info.run_name) == (5, "run")
        for name, value in new_transformer().state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
        assert resolve_checkpoint("latest", folder.parent) == resolve_checkpoint(folder, Path()) == folder
        prune(folder.parent, Keep(last=1))
        assert list_checkpoints(folder.parent) == [(5, folder)]
        (folder.parent / "model_step_6.pt").touch()
        prune(folder.parent, Keep(last=1))
        assert not folder.exists()

    def test_a_changed_byte_is_found(self, folder: Path) -> None:
        (data,) = folder.glob("*.distcp")
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        with pytest.raises(UserError, match="model_step_5 is not a whole checkpoint"):
            load_checkpoint(folder)

    def test_a_missing_file_is_found(self, folder: Path) -> None:
        next(folder.glob("*.distcp")).unlink()
        with pytest.raises(UserError, match="model_step_5 is not a whole checkpoint"):
            load_checkpoint(folder)

    def test_checksums_of_an_earlier_version_are_read(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        state["parts"] = json.loads((folder / "checksums.json").read_text())
        del state["format"]
        (folder / "checksums.json").unlink()
        save_checkpoint(folder / "state.pt", state)
        load_model(folder)
        state["parts"][".metadata"] = "0" * 32
        save_checkpoint(folder / "state.pt", state)
        with pytest.raises(UserError, match="model_step_5 is not a whole checkpoint"):
            load_checkpoint(folder)

    def test_nothing_in_its_table_is_executed(self, folder: Path, tmp_path: Path) -> None:
        table = pickle.dumps(Intruder(tmp_path / "was here"))
        (folder / ".metadata").write_bytes(table)
        checksums = json.loads((folder / "checksums.json").read_text())
        checksums[".metadata"] = xxhash.xxh3_128(table).hexdigest()
        (folder / "checksums.json").write_text(json.dumps(checksums))
        with pytest.raises(UserError, match="model_step_5 is not a whole checkpoint"):
            load_checkpoint(folder)
        assert not (tmp_path / "was here").exists()
        pickle.loads(table)
        assert (tmp_path / "was here").exists(), "an ordinary reader would have done it"


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)
