"""What the main process writes down: metrics, samples, pictures and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config.errors import UserError
from config.schema import Config
from training.checkpointing import Checkpoints
from training.console import Console
from training.tracking import Tracker


class Record:
    """The record of one run in `directory`, continued where `state`, the checkpoint resumed from, is not empty."""

    def __init__(self, config: Config, directory: Path, console: Console, state: dict[str, Any]) -> None:
        training = config.training
        self._config = config
        self.checkpoints = Checkpoints(
            Path(training.checkpoint_dir),
            directory.name,
            keep_last=training.keep_last,
            keep_best=training.keep_best,
            best=state.get("best"),
        )
        step = state.get("step", 0)
        self.checkpoints.set_aside_others(step, console.say)
        self.tracker = Tracker(directory, config, console.say, step, state.get("wandb_id"))

    def save(self, state: dict[str, Any]) -> UserError | None:
        """Write a checkpoint; returns what kept it from being written, such as a full disk, if anything did."""
        state = {**state, "config": self._config.model_dump(), "wandb_id": self.tracker.wandb_id}
        try:
            self.checkpoints.save(state)
        except UserError as error:
            return error
        return None

    def close(self) -> None:
        """Finish the picture and Weights & Biases."""
        self.tracker.close()
