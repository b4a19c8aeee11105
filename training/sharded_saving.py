"""Saving a sharded run: every process has its share of a checkpoint written, and the main one makes it a checkpoint.

The plan of a save, while the run goes on:

1. All agree on a folder without a name, and, the first time, on who writes what. Each process copies its share beside
   the next forward and backward pass, and a process of its own writes it into the folder.
2. After every step each says whether its writer is still busy; that travels with what they ask one another anyway.
3. When none is, they tell one another checksums, or what went wrong. The main process has the table of the tensors
   written, the folder renamed, and `latest` moved on to it. So nothing has a checkpoint's name before all is there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from config.errors import UserError
from config.files import atomic_write, disk_errors
from config.training import TrainingConfig
from model.archive import SealingFile
from model.checkpoint import save_checkpoint, write_tensors
from model.checkpoint_folder import STATE, checkpoint_path
from training.background import BackgroundWriter
from training.checkpointing import GOES_ON, PARTS_OF
from training.distributed import Process
from training.record import Record
from training.staging import Staging, shares_bytes, staged_bytes
from training.writer import FolderJob, Outcome, ShareJob

if TYPE_CHECKING:
    from model.sharded_checkpoint import WritingPlan


@dataclass
class _Save:
    """A checkpoint on its way. `lengths` are those of the archives in this process's file."""

    folder: Path
    step: int
    best: dict[str, Any] | None
    final: bool
    plan: WritingPlan
    started: float = field(default_factory=time.monotonic)
    lengths: list[int] = field(default_factory=list)
    outcome: Outcome | None = None


class ShardedSaving:
    """The checkpoints of a sharded run, as one process sees them; the main one has the `record`.

    All processes call every method at the same steps.
    """

    def __init__(
        self, training: TrainingConfig, process: Process, record: Record | None, say: Callable[[str], None]
    ) -> None:
        self._directory = Path(training.checkpoint_dir)
        self._process, self._record, self._say = process, record, say
        self._writer = BackgroundWriter(say) if training.save_in_background and os.name == "posix" else None
        self._prepared = False
        self._plan: tuple[object, WritingPlan] | None = None
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether this process's share is still being written."""
        save = self._save
        if save is None:
            return False
        if save.outcome is None and self._writer is not None:
            save.outcome = self._writer.result(wait=False)
        return save.outcome is None

    def tend(self, state: Callable[[], dict[str, Any]], busy: bool) -> None:
        """To be called after every step; `busy` tells whether any process is. Finishes what all have written."""
        if not self._prepared and self._writer is not None:
            from model.sharded_checkpoint import take_apart

            self._prepared = True
            plain, tensors = take_apart(state())
            own = shares_bytes(self._agree(tensors).own(tensors))
            self._writer.prepare(own + (staged_bytes(plain) if self._process.is_main else 0))
        if self._save is not None and not busy and (error := self._conclude()) is not None:
            self._say(f"warning: {error} {GOES_ON}")
        if self._record is not None:
            self._record.checkpoints.hear()

    def save(self, state: dict[str, Any], final: bool) -> UserError | None:
        """Save `state`; returns what went wrong, where that is known already and this is the main process.

        The `final` one is on the disk when this returns.
        """
        from model.sharded_checkpoint import data_file, take_apart

        if self._save is not None and (error := self._conclude()) is not None:
            self._say(f"warning: {error} {GOES_ON}")
        if self._record is not None:
            state = self._record.described(state)
        plain, tensors = take_apart(state)
        try:
            folder = self._make_folder(state["step"])
        except UserError as error:
            return error
        plan = self._agree(tensors)
        own, whole = plan.own(tensors), plain if self._process.is_main else None
        path = folder / data_file(self._process.rank)
        save = self._save = _Save(folder, state["step"], state.get("best"), final, plan)
        if self._writer is None:
            save.outcome = _write_here(path, own, whole, save)
            return self._conclude()

        def make(staging: Staging, stream: torch.cuda.Stream | None) -> ShareJob:
            archive, parts, save.lengths = staging.lay_out_shares(whole, own, stream)
            return ShareJob(path, parts, None if whole is None else (folder / STATE, archive))

        self._writer.submit(make)
        return self._conclude() if final else None

    def settle(self) -> None:
        """To be called before the weights change: waits until the last state that was saved need not stay as it is."""
        if self._writer is not None:
            self._writer.settle()

    def close(self) -> None:
        """Let the writer end, and give the memory back. What is still on its way comes to nothing."""
        if self._writer is not None:
            self._writer.close()

    def _conclude(self) -> UserError | None:
        """Wait for every process's share; the main one then finishes the checkpoint, and knows what went wrong."""
        from model.sharded_checkpoint import TABLE

        save, self._save = self._save, None
        assert save is not None
        if save.outcome is None:
            assert self._writer is not None
            save.outcome = self._writer.result(wait=True)
        assert save.outcome is not None
        told: list[Any] = [None] * self._process.world_size
        dist.all_gather_object(told, (save.outcome.error, save.outcome.checksums, save.lengths))
        if self._record is None:
            return None
        errors, checksums, lengths = zip(*told, strict=True)
        if any(errors):
            shutil.rmtree(save.folder, ignore_errors=True)
            return UserError(next(filter(None, errors)))
        path = checkpoint_path(self._directory, save.step).with_suffix("")
        found = {name: value for each in checksums for name, value in each.items()}
        checkpoints = self._record.checkpoints
        job = FolderJob(path, save.folder, (TABLE, save.plan.table(lengths)), found, checkpoints.keep(save.best))
        try:
            checkpoints.finish_folder(job, save.best, save.started, save.final)
        except UserError as error:
            return error
        return None

    def _agree(self, tensors: dict[str, Any]) -> WritingPlan:
        """Who writes what; asked anew only where some process has other tensors than before."""
        from model.sharded_checkpoint import plan_writing

        known = [(name, tensor.to_local().shape, tensor.dtype) for name, tensor in tensors.items()]
        if self._process.largest(int(self._plan is None or self._plan[0] != known)):
            self._plan = known, plan_writing(tensors)
        assert self._plan is not None
        return self._plan[1]

    def _make_folder(self, step: int) -> Path:
        """A folder beside the checkpoints that no other save has written to, on a disk that all processes see."""
        named = [f".model_step_{step}.{secrets.token_hex(4)}{PARTS_OF}"]
        dist.broadcast_object_list(named, src=0)
        folder, error = self._directory / named[0], None
        if self._process.is_main:
            try:
                with disk_errors(folder):
                    folder.mkdir(parents=True)
            except UserError as raised:
                error = raised
        self._process.largest(0)  # the main one has made it
        if self._process.largest(int(not folder.is_dir())):
            raise error or UserError(
                f"Not every machine sees {self._directory}/. A sharded run needs training.checkpoint_dir on a shared "
                "disk."
            )
        return folder


def _write_here(path: Path, own: list[torch.Tensor], state: dict[str, Any] | None, save: _Save) -> Outcome:
    """Write a share within the step, for which nothing is copied but what lies on another device."""
    try:
        if state is not None:
            save_checkpoint(path.with_name(STATE), state)
        with atomic_write(path) as file:
            sealing = SealingFile(file)
            save.lengths = write_tensors((_alone(tensor) for tensor in own), sealing)
        return Outcome(path, {path.name: sealing.checksum})
    except UserError as error:
        return Outcome(path, error=str(error))


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the memory of the host, with nothing else in its own."""
    here = tensor.detach().cpu()
    return here if here.untyped_storage().nbytes() == here.nbytes else here.clone()
