"""The checkpoint folder as one run uses it: writing, keeping the last few and the best, standing aside for others."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import disk_errors, exclusive
from config.training import TrainingConfig
from model.checkpoint import checkpoint_run_name, save_checkpoint
from model.checkpoint_folder import LATEST, Keep, checkpoint_path, list_checkpoints, set_latest
from training.background import BackgroundWriter
from training.staging import staged_bytes
from training.writer import FolderJob, Job, finish, perform

PREVIOUS = "previous"
PARTS_OF = ".parts"  # the ending of a folder that is not yet a checkpoint
PATIENCE = 60.0  # seconds that the writer of a run that was killed gets for its last file
LONG = 1.0  # seconds of waiting that are worth a word
ASSUMED_SPEED = 1e8  # bytes per second of a disk of which nothing is known yet
GOES_ON = "Training goes on, and tries again at the next checkpoint."


@dataclass(frozen=True, slots=True)
class Best:
    """The best checkpoint of a run so far, by the `metric` that had this `value` there."""

    path: Path
    step: int
    metric: str
    value: float


def best_checkpoint(training: TrainingConfig, best: dict[str, Any] | None) -> Best | None:
    """What the entry `best` of a checkpoint names in `training.checkpoint_dir`; None where that is not there."""
    for step, path in list_checkpoints(Path(training.checkpoint_dir)):
        if best is not None and step == best["step"]:
            ((metric, value),) = ((key, value) for key, value in best.items() if key != "step")
            return Best(path, step, metric, value)
    return None


class Checkpoints:
    """The checkpoints of the run `run_name` in `training.checkpoint_dir`, which is this run's alone until `close`.

    `best` is {"step", the metric's name} of the best one by `training.best_metric`, itself part of every checkpoint.
    With `training.save_in_background` all but the last are written by another process. What goes wrong there is said
    when it is known, and not raised; every earlier checkpoint is then still there.
    """

    def __init__(
        self, training: TrainingConfig, run_name: str, say: Callable[[str], None], best: dict[str, Any] | None = None
    ) -> None:
        self.directory = Path(training.checkpoint_dir)
        self.run_name = run_name
        self.best = best
        self.latest: Path | None = None
        self._training = training
        self._say = say
        self._resources = ExitStack()
        busy = f"Another run is writing to {self.directory}/. Wait for its end, or set another training.checkpoint_dir."
        lock = self._resources.enter_context(exclusive(self.directory / LATEST, busy, PATIENCE))
        for leftover in self.directory.glob(".model_step_*.tmp"):
            leftover.unlink(missing_ok=True)
        for unfinished in self.directory.glob(f".model_step_*{PARTS_OF}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        self._background: BackgroundWriter | None = None
        if training.save_in_background and os.name == "posix":
            self._background = BackgroundWriter(say, (lock.fileno(),) if lock else ())
            self._resources.callback(self._background.close)
        self._best_then: dict[str, Any] | None = None
        self._submitted = 0.0
        self._ready = False
        self.seconds_to_save = 0.0

    def set_aside_others(self, step: int) -> None:
        """Move to `previous/<run name>/` what another run left here, and what this one wrote after `step`.

        So nothing that someone may want is overwritten, and the newest file here is always this run's.
        """
        moved: dict[Path, int] = {}
        for found, path in list_checkpoints(self.directory):
            owner = _run_name(path)
            if owner == self.run_name and found <= step:
                self.latest = path
                continue
            target = _free_place(self.directory / PREVIOUS / owner, path.name)
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            moved[target.parent] = moved.get(target.parent, 0) + 1
        for folder, number in moved.items():
            self._say(f"Moved {number} earlier checkpoint{'s' if number > 1 else ''} to {folder}/")
        if self.latest is None:
            (self.directory / LATEST).unlink(missing_ok=True)
        else:
            set_latest(self.latest)

    def tend(self, state: Callable[[], dict[str, Any]]) -> None:
        """As `hear`; makes ready, too, for states as large as this one."""
        if not self._ready:
            first, self._ready = state(), True
            self.seconds_to_save = self.seconds_to_save or staged_bytes(first) / ASSUMED_SPEED
            if self._background is not None:
                self._background.prepare(staged_bytes(first))
        self.hear()

    def hear(self) -> None:
        """To be called after every step: hears of what was written."""
        self._hear(wait=False)

    def described(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with the name of the run, and which checkpoint is the best; waits for what is being written."""
        self._hear(wait=True)
        metric, best = self._training.best_metric, self.best
        value, before = state.get(metric), (self.best or {}).get(metric)
        if value is not None and math.isfinite(value):
            if before is None or (value <= before if metric == "validation_loss" else value >= before):
                best = {"step": state["step"], metric: value}
        return {**state, "run_name": self.run_name, "best": best}

    def save(self, state: dict[str, Any], final: bool) -> None:
        """Save `state` as the checkpoint of its step, then delete those of this run that need not be kept.

        The `final` one is on the disk when this returns; it raises `UserError` where the disk is full.
        """
        state = self.described(state)
        path, best = checkpoint_path(self.directory, state["step"]), state["best"]
        if final or self._background is None:
            started = time.monotonic()
            save_checkpoint(path, state)
            finish(path, self.keep(best))
            self.seconds_to_save = time.monotonic() - started
            self.best, self.latest = best, path
        else:
            keep = self.keep(best)
            self._best_then, self._submitted = best, time.monotonic()
            self._background.submit(lambda staging, stream: Job(path, staging.lay_out(state, stream), keep))

    def finish_folder(self, job: FolderJob, best: dict[str, Any] | None, started: float, final: bool) -> None:
        """Do `job`, which makes of what all processes of a sharded run have written a checkpoint; otherwise as `save`.

        `best` is that of the `described` state, `started` the time of the monotonic clock when its saving began.
        """
        self._hear(wait=True)
        if final or self._background is None:
            outcome = perform(job)
            if outcome.error is not None:
                raise UserError(outcome.error)
            self.seconds_to_save = time.monotonic() - started
            self.best, self.latest = best, job.path
        else:
            self._best_then, self._submitted = best, started
            self._background.submit(lambda staging, stream: job)
            self._background.settle()

    def keep(self, best: dict[str, Any] | None) -> Keep:
        """Which checkpoints of this run are to stay when the next one is written."""
        training = self._training
        return Keep(training.keep_last, training.keep_every, best["step"] if best and training.keep_best else None)

    def settle(self) -> None:
        """To be called before the weights change: waits until the last state that was saved need not stay as it is."""
        if self._background is not None:
            self._background.settle()

    def close(self) -> None:
        """Wait for what is being written, and let the folder go."""
        with self._resources:
            self._hear(wait=True)

    def _hear(self, wait: bool) -> None:
        """Learn how the checkpoint fared that the background writer was given last."""
        if self._background is None or not self._background.busy:
            return
        started = time.monotonic()
        done = self._background.result(wait)
        if done is None:
            return
        path, error = done.path, done.error
        if time.monotonic() - started > LONG:
            self._say(f"Waited {time.monotonic() - started:.1f} s until {path} was on the disk.")
        if error is not None:
            self._say(f"warning: {error} {GOES_ON}")
        else:
            self.best, self.latest = self._best_then, path
            self.seconds_to_save = time.monotonic() - self._submitted


def _run_name(path: Path) -> str:
    try:
        return checkpoint_run_name(path)
    except UserError:
        return "unreadable"


def _free_place(folder: Path, name: str) -> Path:
    """`folder / name`, or, where that exists, the same in `folder-2`, `folder-3` and so on."""
    number, place = 1, folder / name
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}") / name
    return place
