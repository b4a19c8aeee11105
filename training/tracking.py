"""The record of a run: `runs/<name>/` on disk, and Weights & Biases beside it.

config.yaml        the resolved configuration
environment.json   versions, code, hardware and data, one entry per start of the run
metrics.jsonl      one JSON object per logged step
samples.jsonl      sample texts over time
skipped.jsonl      the batches of steps that were left out, if there were any
curves.png         losses and learning rate
recipe.yaml        what the configuration was before the command line changed single settings
result.json        once the run is complete: its last step, validation loss, and the hash of its weights
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import write_text
from config.load import save_config
from config.schema import Config
from training.environment import describe
from training.plots import plot_curves
from training.weights_and_biases import WandbRun

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SKIPPED = "skipped.jsonl"
CURVES = "curves.png"
ENVIRONMENT = "environment.json"
RECIPE = "recipe.yaml"
RESULT = "result.json"

Page = Callable[[Path], object]  # makes the page of the run in a folder


class Tracker:
    """Writes the record of one run. A full disk never stops a run here: lines wait and are written when there is room.

    A run that resumes at `step` loses what an earlier attempt recorded after it. `inputs` is what the environment does
    not know: fingerprints of data and tokenizer, device and precision.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        warn: Callable[[str], None],
        step: int,
        wandb_id: str | None,
        recipe: Config | None = None,
        page: Page | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self._warn = warn
        self._warned = False
        self._drawn = time.monotonic()
        self._unwritten: dict[str, list[str]] = {METRICS: [], SAMPLES: [], SKIPPED: []}
        self.rows = _truncate(directory / METRICS, step)
        for name in (SAMPLES, SKIPPED):
            _truncate(directory / name, step)
        save_config(config, directory / "config.yaml")
        if recipe is not None:
            save_config(recipe, directory / RECIPE)
        self._page = page
        (directory / RESULT).unlink(missing_ok=True)
        _append_environment(directory / ENVIRONMENT, step, inputs or {})
        self._wandb = WandbRun(config, directory, wandb_id, warn)

    @property
    def wandb_id(self) -> str | None:
        """The run's id at Weights & Biases, None where that is off."""
        return self._wandb.id

    def log(self, row: dict[str, Any]) -> None:
        """Record a logged step."""
        row = {key: _finite(value) for key, value in row.items()}
        self.rows.append(row)
        self._append(METRICS, row)
        self._wandb.log({key: value for key, value in row.items() if value is not None})

    def sample(self, step: int, text: str) -> None:
        """Record a sample text."""
        self._append(SAMPLES, {"step": step, "text": text})
        self._wandb.log({"step": step, "sample": text})

    def skipped(self, step: int, gradient_norm: float, reason: str, places: list[str]) -> None:
        """Record a step that was left out, and where the samples of its batch lie."""
        row = {"step": step, "reason": reason, "gradient_norm": _finite(gradient_norm), "samples": places}
        self._append(SKIPPED, row)

    def draw(self, now: bool = False) -> None:
        """Bring `curves.png` and the page up to date; without `now` at most every ten seconds: it takes half of one."""
        if not now and time.monotonic() - self._drawn < 10:
            return
        self._drawn = time.monotonic()
        try:
            plot_curves(self.rows, self.directory / CURVES, self.directory.name)
            if self._page is not None:
                self._page(self.directory)
        except UserError as error:
            self._complain(str(error))

    def close(self) -> None:
        """Draw the last picture and end the run at Weights & Biases."""
        if self.rows:
            self.draw(now=True)
        self._wandb.finish()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self._unwritten[name].append(json.dumps(record, ensure_ascii=False) + "\n")
        path = self.directory / name
        try:
            size = path.stat().st_size if path.exists() else 0
            try:
                with open(path, "ab") as file:
                    file.write("".join(self._unwritten[name]).encode())
            except OSError:
                with open(path, "ab") as file:
                    file.truncate(size)
                raise
        except OSError as error:
            self._complain(f"cannot write {path} ({error.strerror}); what is missing is written when there is room")
            return
        self._unwritten[name].clear()

    def _complain(self, message: str) -> None:
        if not self._warned:
            self._warn(f"warning: {message}")
        self._warned = True


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of `path` after `step`, and one that a crash cut short; return those that stay."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(record)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    return kept


def _append_environment(path: Path, step: int, inputs: Mapping[str, Any]) -> None:
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_text(path, json.dumps([*starts, {"from_step": step, **describe(), **inputs}], indent=2) + "\n")


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
