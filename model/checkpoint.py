"""Checkpoints: everything a run needs to go on in one file, written whole or not at all, read without running code."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from config.earlier import with_keys_added_since
from config.errors import UserError
from config.files import atomic_write
from config.load import config_from_dict
from config.model import ModelConfig
from config.schema import Config
from model.archive import SealingFile, is_intact, once_per_version
from model.checkpoint_folder import STATE, checkpoint_step, list_checkpoints
from model.sharding import Stored, fill_all
from model.transformer import Transformer

FORMAT = 1
# What may differ between a checkpoint and the model its weights go into: neither shapes nor results depend on it.
_FREE_KEYS = {"variant", "dropout", "init_std", "zero_init_projections"}

_is_intact = once_per_version(is_intact)


class Writable(Protocol):
    """What `torch.save` needs of a file."""

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; returns its length in bytes."""

    def flush(self) -> None:
        """Hand what is buffered to the system."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says about itself; `config` is the whole resolved configuration of the run that wrote it.

    `finetuning` is None after pre-training, else a dictionary whose "format" is that of the examples: "text",
    "prompt-completion", or "messages", after which the model answers in the tokenizer's chat template.
    """

    path: Path
    step: int
    run_name: str
    config: dict[str, Any]
    tokenizer_fingerprint: str
    validation_loss: float | None
    finetuning: dict[str, Any] | None

    @property
    def masked(self) -> bool:
        """Whether no token saw one of another document when this was trained, so that none should in an evaluation."""
        return bool(self.config.get("training", {}).get("documents") == "masked")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, with "format" set, to `path`: a reader sees the old file or the new one, never a part.

    `state` holds tensors, numbers, strings, None, and dictionaries, lists and tuples of them; anything else is a
    TypeError here rather than a file that cannot be read back. A full disk raises `UserError`.
    """
    with atomic_write(path) as file:
        sealing = SealingFile(file)
        try:
            write_state(state, sealing)
        except RuntimeError as error:
            # When a write fails, torch closes its archive, which fails in its turn and hides the system's own error.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        sealing.seal()


def write_state(state: dict[str, Any], file: Writable) -> None:
    """Write `state` to `file` as the archive that `load_checkpoint` reads, but for its checksum."""
    _check_plain(state, "state")
    with _one_checksum():
        torch.save({"format": FORMAT, **state}, file)  # type: ignore[arg-type]


def write_tensors(tensors: Iterable[Tensor], file: Writable) -> list[int]:
    """Write an archive of each tensor to `file`, one after the other; returns their lengths in bytes."""
    counting = _CountingFile(file)
    ends = [0]
    with _one_checksum():
        for tensor in tensors:
            torch.save(tensor, counting)  # type: ignore[arg-type]
            ends.append(counting.count)
    return [end - start for start, end in pairwise(ends)]


class _CountingFile:
    def __init__(self, file: Writable) -> None:
        self.count = 0
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
        self.count += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _one_checksum() -> Iterator[None]:
    """Without those that `torch.save` makes of every tensor: that of the whole file is enough."""
    crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(crc32)


def load_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without executing anything in it, once its checksum has been found right.

    Raises `UserError` where the file is missing, cut short, damaged, not a checkpoint of ours, or holds anything but
    data; it names the newest whole checkpoint of an earlier step.
    """
    path = Path(path)
    try:
        return _read(path, map_location)
    except _Damaged as error:
        raise UserError(f"{error} {_way_out(path)}") from error


def checkpoint_run_name(path: Path) -> str:
    """The name of the run that wrote a checkpoint, for which no weight is read; `UserError` where it cannot be."""
    return checkpoint_origin(path)[0]


def checkpoint_origin(path: Path) -> tuple[str, int]:
    """The run that wrote a checkpoint and the step, for which no weight is read; `UserError` where it cannot be."""
    state = _read(path, checking=False)
    return str(state.get("run_name") or "unnamed"), int(state["step"])


class _Damaged(UserError):
    """A file that is not what was written."""


def _read(path: Path, map_location: torch.device | str = "cpu", checking: bool = True) -> dict[str, Any]:
    file = path / STATE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no checkpoint {path}. Train one with: python scripts/train.py")
    try:
        if checking and _is_intact(file) is False:
            raise _Damaged(f"{path} is damaged: its checksum is not that of its content.")
        state = torch.load(file, map_location=map_location, weights_only=True, mmap=True)
        if path.is_dir():
            from model.sharded_checkpoint import open_folder

            state = open_folder(state, path, checking)
    except PermissionError as error:
        raise UserError(f"May not read {path}: permission denied.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise _Damaged(
            f"{path} is not a whole checkpoint: it was cut short, damaged, or is another kind of file."
        ) from error
    if not isinstance(state, dict) or not {"model", "config", "step"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this program: it lacks the weights or the configuration.")
    if state.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {state.get('format')}; this version reads format {FORMAT}.")
    state["config"] = with_keys_added_since(state["config"])
    return state


def _way_out(path: Path) -> str:
    """What to do about a bad checkpoint: use the newest good one of an earlier step in its folder, if there is any."""
    step = checkpoint_step(path)
    for earlier, other in reversed(list_checkpoints(path.parent)):
        if step is None or earlier >= step:
            continue
        try:
            _read(other)
        except UserError:
            continue
        return f"The newest whole one before it is {other}."
    return "Use another checkpoint."


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, CheckpointInfo]:
    """The model of a checkpoint, in evaluation mode on `device`, its weights cast to `dtype` if given."""
    state = load_checkpoint(path)
    config = checkpoint_model_config(path, state)
    with torch.device("meta"):
        model = Transformer(config)
    if dtype is not None:
        model = model.to(dtype)
    model.to_empty(device=device)
    load_weights(model, state, path)
    info = CheckpointInfo(
        path=Path(path),
        step=state["step"],
        run_name=state.get("run_name", ""),
        config=state["config"],
        tokenizer_fingerprint=state.get("tokenizer_fingerprint", ""),
        validation_loss=state.get("validation_loss"),
        finetuning=state.get("finetuning"),
    )
    return model.eval(), info


def checkpoint_config(path: Path, state: dict[str, Any]) -> Config:
    """The configuration inside a loaded checkpoint, validated."""
    return config_from_dict(state["config"], str(path))


def checkpoint_model_config(path: Path, state: dict[str, Any]) -> ModelConfig:
    """The model's part of it alone, so that settings of other rooms that came or went since then do not matter."""
    try:
        return ModelConfig.model_validate(state["config"]["model"])
    except (KeyError, TypeError, ValidationError) as error:
        keys = [str(item["loc"][0]) for item in error.errors() if item["loc"]] if hasattr(error, "errors") else []
        named = f" (model.{', model.'.join(keys)})" if keys else ""
        raise UserError(
            f"{path} was written by another version of this program: the configuration of its model is not "
            f"understood here{named}."
        ) from error


def load_weights(model: Transformer, state: dict[str, Any], path: Path) -> None:
    """Copy the weights of a loaded checkpoint into `model`.

    Raises `UserError` naming every setting in which the two models differ.
    """
    require_same_model(checkpoint_model_config(path, state), model.config, path)
    weights: dict[str, Tensor | Stored] = state["model"]
    own = model.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in weights.items()}:
        raise UserError(f"{path} is damaged: its weights are not those that its own configuration describes.")
    fill_all((own[name], value) for name, value in weights.items())


def require_same_model(saved: ModelConfig, wanted: ModelConfig, path: Path) -> None:
    """Raise `UserError` unless weights of the model `saved`, found at `path`, mean the same in the model `wanted`."""
    keys = [key for key in ModelConfig.model_fields if key not in _FREE_KEYS]
    resolved = [
        config.model_dump()
        | {"n_kv_heads": config.kv_heads, "d_head": config.head_dim, "d_ff": config.feed_forward_dim}
        for config in (saved, wanted)
    ]
    for config in resolved:
        if wanted.position == "learned":
            config["rope_theta"] = config["rope_scaling"] = None
        if wanted.window is None:
            config["window_pattern"] = None
    differing = [
        f"model.{key} is {resolved[0][key]} there and {resolved[1][key]} here"
        for key in keys
        if resolved[0][key] != resolved[1][key]
    ]
    if differing:
        raise UserError(
            f"{path} holds another model: {'; '.join(differing)}. "
            "Use the configuration it was trained with, or another checkpoint."
        )


def _check_plain(value: Any, where: str) -> None:
    """Assert that `torch.load(weights_only=True)` will accept what is about to be saved."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, bytes, type(None)) and not isinstance(value, Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")
