"""The checkpoint folder as one run uses it: writing, keeping the last few and the best, standing aside for others."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import disk_errors
from model.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, save_checkpoint

PREVIOUS = "previous"


class Checkpoints:
    """The checkpoints of the run `run_name` in `directory`.

    `best` is {"step", "validation_loss"} of the one with the lowest validation loss, itself part of every checkpoint.
    """

    def __init__(
        self, directory: Path, run_name: str, *, keep_last: int, keep_best: bool, best: dict[str, Any] | None = None
    ) -> None:
        self.directory = directory
        self.run_name = run_name
        self.best = best
        self._keep_last = keep_last
        self._keep_best = keep_best
        self.latest: Path | None = None

    def set_aside_others(self, step: int, say: Callable[[str], None]) -> None:
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
            say(f"Moved {number} earlier checkpoint{'s' if number > 1 else ''} to {folder}/")

    def save(self, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of its step, then delete those of this run that need not be kept.

        Raises `UserError` where the disk is full; every earlier checkpoint is then still there.
        """
        step, loss = state["step"], state["validation_loss"]
        best = self.best
        if loss is not None and math.isfinite(loss) and (best is None or loss <= best["validation_loss"]):
            best = {"step": step, "validation_loss": loss}
        path = checkpoint_path(self.directory, step)
        save_checkpoint(path, {**state, "run_name": self.run_name, "best": best})
        self.best, self.latest = best, path
        self._prune()
        return path

    def _prune(self) -> None:
        kept = list_checkpoints(self.directory)
        for step, path in kept[: -self._keep_last]:
            if not (self._keep_best and self.best and step == self.best["step"]):
                path.unlink(missing_ok=True)


def _run_name(path: Path) -> str:
    try:
        return str(load_checkpoint(path).get("run_name") or "unnamed")
    except UserError:
        return "unreadable"


def _free_place(folder: Path, name: str) -> Path:
    """`folder / name`, or, where that exists, the same in `folder-2`, `folder-3` and so on."""
    number, place = 1, folder / name
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}") / name
    return place
