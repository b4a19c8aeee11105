"""A folder of checkpoints: their names, which one is the latest, and which ones need not be kept.

`latest`, a text file with the name of a checkpoint, is moved on when that checkpoint is whole on the disk. Readers go
by it, and by the highest step where it is missing or names what is not there. Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from config.errors import UserError
from config.files import remove_directory, write_text

LATEST = "latest"
# In a checkpoint that is a folder:
STATE = "state.pt"
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"model_step_(\d+)(\.pt)?")


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints stay: the `last` so many, every one whose step `every` divides, and the one of step `best`."""

    last: int
    every: int | None = None
    best: int | None = None


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in `directory`."""
    return directory / f"model_step_{step}.pt"


def checkpoint_step(path: Path) -> int | None:
    """The step that the name of a checkpoint tells; None where it is not the name of one."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of every checkpoint in `directory`, ascending by step."""
    if not directory.is_dir():
        return []
    found = ((checkpoint_step(path), path) for path in directory.iterdir())
    return sorted((step, path) for step, path in found if step is not None)


def latest_checkpoint(directory: Path) -> Path:
    """The checkpoint that `latest` in `directory` names, else the one of the highest step; `UserError` without any."""
    found = [path for _, path in list_checkpoints(directory)]
    if not found:
        raise UserError(f"There is no checkpoint in {directory}/. Train one with: python scripts/train.py")
    try:
        named = directory / (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return found[-1]
    return named if named in found else found[-1]


def set_latest(path: Path) -> None:
    """Let `latest` name the checkpoint at `path`."""
    write_text(path.parent / LATEST, path.name + "\n")


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, a file or a folder."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink(missing_ok=True)


def prune(directory: Path, keep: Keep) -> None:
    """Delete the checkpoints in `directory` that `keep` does not name."""
    for step, path in list_checkpoints(directory)[: -keep.last]:
        if step != keep.best and (keep.every is None or step % keep.every):
            remove_checkpoint(path)


def resolve_checkpoint(name: str | Path, directory: Path) -> Path:
    """The checkpoint that a user means: "latest" (in `directory`), a folder of them (its latest), or its own path."""
    if str(name) == "latest":
        return latest_checkpoint(directory)
    path = Path(name)
    if path.is_dir():
        return path if (path / STATE).is_file() else latest_checkpoint(path)
    if not path.is_file():
        steps = [step for step, _ in list_checkpoints(path.parent)]
        there = f"Steps that exist there: {', '.join(map(str, steps))}." if steps else "Use latest, or train one first."
        raise UserError(f"There is no checkpoint {path}. {there}")
    return path
