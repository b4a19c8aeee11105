"""What the main process writes down: metrics, samples, pictures and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.schema import Config
from training.checkpointing import Checkpoints
from training.console import Console
from training.tracking import Page, Tracker


class Record:
    """The record of one run in `directory`, continued where `state`, the checkpoint resumed from, is not empty."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        console: Console,
        state: dict[str, Any],
        recipe: Config | None = None,
        page: Page | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self.checkpoints = Checkpoints(config.training, directory.name, console.say, state.get("best"))
        step = state.get("step", 0)
        self.checkpoints.set_aside_others(step)
        self.tracker = Tracker(directory, config, console.say, step, state.get("wandb_id"), recipe, page, inputs)

    def save(self, state: dict[str, Any], final: bool) -> UserError | None:
        """Save a checkpoint; returns what kept it from being written, such as a full disk, if that is known already."""
        try:
            self.checkpoints.save(self._complete(state), final)
        except UserError as error:
            return error
        return None

    def tend(self, state: Callable[[], dict[str, Any]]) -> None:
        """To be called after every step, with a function that makes the state of a checkpoint."""
        self.checkpoints.tend(lambda: self._complete(state()))

    def described(self, state: dict[str, Any]) -> dict[str, Any]:
        """All that a checkpoint holds, for one that is not written here."""
        return self.checkpoints.described(self._complete(state))

    def settle(self) -> None:
        """To be called before the weights change."""
        self.checkpoints.settle()

    @property
    def seconds_to_save(self) -> float:
        """About what the next checkpoint takes until it is on the disk."""
        return self.checkpoints.seconds_to_save

    def _complete(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "config": self._config.model_dump(), "wandb_id": self.tracker.wandb_id}

    def close(self) -> None:
        """Wait for the last checkpoint, finish the picture and Weights & Biases."""
        try:
            self.checkpoints.close()
        finally:
            self.tracker.close()
