"""The program of the process that writes checkpoints beside a training run, from shared memory to the disk.

It knows nothing of PyTorch or of what it writes. It ends when the run does, however that ends, but finishes the file in
hand first. What it is told and answers are pickled objects on a socket that only the run holds.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from config.errors import UserError
from config.files import replace_directory
from model.archive import write_archive
from model.checkpoint_folder import CHECKSUMS, Keep, prune, set_latest

Part = bytes | tuple[int, int]
"""A piece of a file: its bytes, or (offset, length) of them in the shared memory."""
Write = Callable[[Path, Sequence[Part], bool], str]
"""Writes a file and returns its checksum; see `write_archive`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job: the checksums of its files by name, or what went wrong."""

    path: Path
    checksums: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint to be written to `path`, after which those in its folder that `keep` does not name are deleted."""

    path: Path
    parts: Sequence[Part]
    keep: Keep

    def do(self, write: Write) -> dict[str, str]:
        """Do it; it may have been begun before."""
        write(self.path, self.parts, True)
        finish(self.path, self.keep)
        return {}


@dataclass(frozen=True, slots=True)
class ShareJob:
    """One process's share of a checkpoint that is a folder: its file of tensors, and perhaps the state beside them."""

    path: Path
    parts: Sequence[Part]
    state: tuple[Path, Sequence[Part]] | None

    def do(self, write: Write) -> dict[str, str]:
        """Do it; it may have been begun before."""
        if self.state is not None:
            write(*self.state, True)
        return {self.path.name: write(self.path, self.parts, False)}


@dataclass(frozen=True, slots=True)
class FolderJob:
    """All shares are in `folder`: with its table and the checksums of all of it, it becomes the checkpoint `path`."""

    path: Path
    folder: Path
    table: tuple[str, bytes]
    checksums: dict[str, str]
    keep: Keep

    def do(self, write: Write) -> dict[str, str]:
        """Do it; it may have been begun before."""
        if self.folder.exists():
            name, content = self.table
            checksums = {**self.checksums, name: write(self.folder / name, [content], False)}
            write(self.folder / CHECKSUMS, [json.dumps(checksums, indent=1).encode()], False)
            replace_directory(self.folder, self.path)
        finish(self.path, self.keep)
        return {}


AnyJob = Job | ShareJob | FolderJob


def finish(path: Path, keep: Keep) -> None:
    """What follows when the checkpoint at `path` is whole on the disk: it becomes the latest, and older ones go."""
    set_latest(path)
    prune(path.parent, keep)


def perform(job: AnyJob, shared: int | None = None) -> Outcome:
    """Do `job`, parts of which may lie in the memory of the descriptor `shared`."""

    def write(path: Path, parts: Sequence[Part], seal: bool) -> str:
        if shared is None or all(isinstance(part, bytes) for part in parts):
            return write_archive(path, [part for part in parts if isinstance(part, bytes)], seal)
        with mmap.mmap(shared, 0, prot=mmap.PROT_READ) as memory, memoryview(memory) as whole:
            views = [part if isinstance(part, bytes) else whole[part[0] : part[0] + part[1]] for part in parts]
            try:
                return write_archive(path, views, seal)
            finally:
                for view in views:
                    if isinstance(view, memoryview):
                        view.release()

    try:
        return Outcome(job.path, job.do(write))
    except UserError as error:
        return _failed(job, str(error))
    except OSError as error:
        return _failed(job, f"Could not write {job.path}: {error.strerror or error}.")


def _failed(job: AnyJob, error: str) -> Outcome:
    if isinstance(job, FolderJob):
        shutil.rmtree(job.folder, ignore_errors=True)
    return Outcome(job.path, error=error)


def main() -> None:
    """Serve the run at the other end of the socket, both given by their descriptors, until it hangs up."""
    shared = int(sys.argv[2])
    os.nice(19)  # the training has the cores first, until it waits for this
    with Connection(int(sys.argv[1])) as run:
        while True:
            try:
                job: AnyJob = run.recv()
                run.send(perform(job, shared))
            except (EOFError, ConnectionError):
                return
