"""Checkpoints of sharded runs: folders that `torch.distributed.checkpoint` writes, every process its own part at once.

In `model_step_N/` lie

- `state.pt`: all that is not sharded, as in a checkpoint that is a single file. Where a sharded tensor belongs, it has
  `{"stored": NAME}` instead; under `parts` stand the checksums of the other files.
- `__P_0.distcp` and `.metadata`: the parts of those tensors that process P had, and which is where.

The folder is written under another name, and renamed when all of it is on the disk. `.metadata` is a pickle: it is read
by an unpickler that knows the few classes of a table of tensors and refuses everything else. The tensors themselves are
read as in a single file, with `weights_only`. So nothing in a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from config.files import disk_errors
from model.sharding import Stored

TABLE = ".metadata"
PARTS = "parts"
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
        for name in sorted(state[PARTS])[rank::world_size]:
            if _checksum(folder / name) != state[PARTS][name]:
                raise pickle.UnpicklingError(f"{name} is not what was written")
    opened: dict[str, Any] = _put_together(state, folder, read_table(folder))
    return opened


def _checksum(file: Path) -> str:
    """XXH3-128 of the content; each version of a file is read through once in the life of a process."""
    found = file.stat()
    return _checksum_of(file, found.st_ino, found.st_size, found.st_mtime_ns)


@cache
def _checksum_of(file: Path, *_version: int) -> str:
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


def write_tensors(tensors: Mapping[str, DTensor], folder: Path) -> dict[str, str]:
    """Write every process's parts of `tensors` into `folder`, on a disk that all processes see. All must call this.

    What two processes both hold is written once. Returns the checksum of every file. A full disk of any of them raises
    `UserError` in all.
    """
    with disk_errors(folder):
        try:
            save(dict(tensors), storage_writer=FileSystemWriter(folder))
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, OSError):
                    raise failure from error
            raise
    rank = dist.get_rank()
    own = [
        path for path in folder.iterdir() if path.name.startswith(f"__{rank}_") or (rank == 0 and path.name == TABLE)
    ]
    found: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, {path.name: _checksum(path) for path in own})
    return {name: value for each in found for name, value in each.items()}


def read_tensors(wanted: Iterable[tuple[Tensor, Stored]]) -> None:
    """Fill tensors, of any type and device, from stored ones of their shapes; of a `DTensor` only a part is read."""
    by_folder: dict[Path, dict[str, Tensor]] = {}
    for target, stored in wanted:
        by_folder.setdefault(stored.folder, {})[stored.name] = target.detach()
    for folder, targets in by_folder.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(targets, storage_reader=_Reader(folder), no_dist=True)
