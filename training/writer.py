"""The program of the process that writes checkpoints beside a training run, from shared memory to the disk.

It knows nothing of PyTorch or of what it writes. It ends when the run does, however that ends, but finishes the file in
hand first. What it is told and answers are pickled objects on a socket that only the run holds.
"""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from config.errors import UserError
from model.archive import write_archive
from model.checkpoint_folder import Keep, prune, set_latest

Part = bytes | tuple[int, int]
"""A piece of a file: its bytes, or (offset, length) of them in the shared memory."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint to be written to `path`, after which those in its folder that `keep` does not name are deleted."""

    path: Path
    parts: list[Part]
    keep: Keep


def finish(path: Path, keep: Keep) -> None:
    """What follows when the checkpoint at `path` is whole on the disk: it becomes the latest, and older ones go."""
    set_latest(path)
    prune(path.parent, keep)


def write(job: Job, shared: int) -> str | None:
    """Do `job`, whose parts lie in the memory of the descriptor `shared`; returns what kept it from being done."""
    try:
        with mmap.mmap(shared, 0, prot=mmap.PROT_READ) as memory, memoryview(memory) as whole:
            views = []
            try:
                for part in job.parts:
                    views.append(part if isinstance(part, bytes) else whole[part[0] : part[0] + part[1]])
                write_archive(job.path, views)
            finally:
                for view in views:
                    if isinstance(view, memoryview):
                        view.release()
        finish(job.path, job.keep)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"Could not write {job.path}: {error.strerror or error}."
    return None


def main() -> None:
    """Serve the run at the other end of the socket, both given by their descriptors, until it hangs up."""
    shared = int(sys.argv[2])
    os.nice(10)  # the training has the cores first
    with Connection(int(sys.argv[1])) as run:
        while True:
            try:
                job: Job = run.recv()
                run.send(write(job, shared))
            except (EOFError, ConnectionError):
                return
