"""Checkpoints of sharded runs: folders in the format of `torch.distributed.checkpoint`, with a part of every process.

In `model_step_N/` lie

- `state.pt`: all that is not sharded, as in a checkpoint that is a single file. Where a sharded tensor belongs, it has
  `{"stored": NAME}` instead.
- `__P_0.distcp` and `.metadata`: the parts of those tensors that process P had, and which is where.
- `checksums.json`: those of these files. (In folders of an earlier version they stand in `state.pt`, under `parts`.)

The folder is written under another name, and renamed when all of it is on the disk. `.metadata` is a pickle: it is read
by an unpickler that knows the few classes of a table of tensors and refuses everything else. The tensors themselves are
read as in a single file, with `weights_only`. So nothing in a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from model.archive import once_per_version
from model.checkpoint_folder import CHECKSUMS
from model.sharding import Stored

TABLE = ".metadata"
_MARK = "stored"
_DATA = re.compile(r"__\d+_\d+\.distcp")
_TABLE_CLASSES = {
    "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _TABLE_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a table of tensors")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """PyTorch's reader, but for how the table is read and what it may name."""

    def read_metadata(self, *_arguments: Any, **_keywords: Any) -> Metadata:
        return read_table(Path(self.path))


def read_table(folder: Path) -> Metadata:
    """Which tensors lie in `folder`, and where. Raises `pickle.UnpicklingError` where it holds anything but that."""
    with open(folder / TABLE, "rb") as file:
        table = _TableUnpickler(file).load()
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise pickle.UnpicklingError("there is no table of tensors")
    if not all(isinstance(entry, TensorStorageMetadata) for entry in table.state_dict_metadata.values()):
        raise pickle.UnpicklingError("something else than tensors is stored")
    if not all(_DATA.fullmatch(place.relative_path) for place in table.storage_data.values()):
        raise pickle.UnpicklingError("tensors are said to lie elsewhere")
    return table


def take_apart(state: Any, name: str = "") -> tuple[Any, dict[str, DTensor]]:
    """`state` with a mark in the place of each `DTensor`, and those by name."""
    if isinstance(state, DTensor):
        return {_MARK: name}, {name: state}
    if not isinstance(state, (dict, list, tuple)):
        return state, {}
    shared: dict[str, DTensor] = {}
    items: dict[Any, Any] = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        items[key], found = take_apart(value, f"{name}.{key}" if name else str(key))
        shared |= found
    return (items if isinstance(state, dict) else type(state)(items.values())), shared


def open_folder(state: dict[str, Any], folder: Path, checking: bool) -> dict[str, Any]:
    """`state`, read from `folder`, with a `Stored` in the place of every mark.

    With `checking`, the files are read through for their checksums; of a run of many processes each reads some of them.
    Raises `pickle.UnpicklingError` where one is not what was written, and `OSError` or `KeyError` where it is missing.
    """
    if checking:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        checksums = state.get("parts") or json.loads((folder / CHECKSUMS).read_text())
        for name in sorted(checksums)[rank::world_size]:
            if _checksum(folder / name) != checksums[name]:
                raise pickle.UnpicklingError(f"{name} is not what was written")
    opened: dict[str, Any] = _put_together(state, folder, read_table(folder))
    return opened


@once_per_version
def _checksum(file: Path) -> str:
    """XXH3-128 of the content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()


def _put_together(state: Any, folder: Path, table: Metadata) -> Any:
    if isinstance(state, (list, tuple)):
        return type(state)(_put_together(value, folder, table) for value in state)
    if not isinstance(state, dict):
        return state
    if state.keys() == {_MARK}:
        found = table.state_dict_metadata[state[_MARK]]
        assert isinstance(found, TensorStorageMetadata)
        return Stored(folder, state[_MARK], found.size, found.properties.dtype)
    return {key: _put_together(value, folder, table) for key, value in state.items()}


@dataclass(frozen=True, slots=True)
class WritingPlan:
    """Which process writes which parts of some tensors: what two of them hold is written once."""

    items: list[list[WriteItem]]
    metadata: Metadata

    def own(self, tensors: Mapping[str, DTensor]) -> list[Tensor]:
        """What this process is to write, in this order, into the file `data_file(rank)`."""
        return [tensors[item.index.fqn].to_local() for item in self.items[dist.get_rank()]]

    def table(self, lengths: Sequence[Sequence[int]]) -> bytes:
        """The file `TABLE`, from the lengths in bytes of what every process has written."""
        places = {}
        for rank, (items, counts) in enumerate(zip(self.items, lengths, strict=True)):
            starts = accumulate(counts, initial=0)
            for item, start, count in zip(items, starts, counts):
                places[item.index] = _StorageInfo(data_file(rank), start, count)
        return pickle.dumps(replace(self.metadata, storage_data=places, version=CURRENT_DCP_VERSION))


def plan_writing(tensors: Mapping[str, DTensor]) -> WritingPlan:
    """Agree on who writes what. All processes must call this."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(tensors), is_coordinator=dist.get_rank() == 0)
    wanted: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(wanted, planner.create_local_plan())
    plans, metadata = planner.create_global_plan(wanted)
    return WritingPlan([plan.items for plan in plans], metadata)


def data_file(rank: int) -> str:
    """The name of the file of a process."""
    return f"__{rank}_0.distcp"


def read_tensors(wanted: Iterable[tuple[Tensor, Stored]]) -> None:
    """Fill tensors, of any type and device, from stored ones of their shapes; of a `DTensor` only a part is read."""
    by_folder: dict[Path, dict[str, Tensor]] = {}
    for target, stored in wanted:
        by_folder.setdefault(stored.folder, {})[stored.name] = target.detach()
    for folder, targets in by_folder.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(targets, storage_reader=_Reader(folder), no_dist=True)
