"""The file that describes a search over settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from config.errors import UserError
from config.load import load_config, nearest
from training.experiment import PlannedRun, read_experiment, settings_of

METRICS: dict[str, Literal["minimize", "maximize"]] = {
    "validation_loss": "minimize",
    "loss": "minimize",
    "task_accuracy": "maximize",
}
_INTERVALS = {"validation_loss": "eval_interval", "loss": "log_interval", "task_accuracy": "task_interval"}
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "hyperband", "none")
RANGE = {"low", "high", "log", "step"}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the file says; `space` is a list of choices or a range for each setting.

    Of a run, `first` is the step of the first measurement, and `last` the number of steps; None where that depends.
    """

    name: str
    base: Path | None
    settings: Sequence[str]
    space: Mapping[str, Any]
    metric: str
    sampler: str
    pruner: str
    trials: int | None
    hours: float | None
    seed: int
    runs_dir: Path
    first: int
    last: int | None

    @property
    def directory(self) -> Path:
        """Where the study and the plots are."""
        return self.runs_dir / self.name

    def run(self, name: str, values: Mapping[str, Any]) -> PlannedRun:
        """The run that tries these values."""
        tried = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        return PlannedRun(name, self.base, [*self.settings, *tried], self.runs_dir)


def read_sweep(path: Path, overrides: Sequence[str] = (), recipe: Path | None = None) -> Sweep:
    """The sweep that the YAML `path` describes; `overrides` go into every run, `recipe` is for its base.

    Raises `UserError` for unknown keys, with the nearest, for an empty space, for values that a setting cannot have,
    and for a metric that the runs would not measure.
    """
    optional = ["base", "settings", "metric", "sampler", "pruner", "trials", "hours", "seed"]
    tree = read_experiment(path, ["name", "space"], optional)
    chosen = {"metric": "validation_loss", "sampler": "tpe", "pruner": "none", **tree}
    for key, known in (("metric", METRICS), ("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if chosen[key] not in known:
            raise UserError(f"{path}: there is no {key} {chosen[key]!r}.{nearest(str(chosen[key]), known)}")
    for key in ("trials", "hours"):
        if tree.get(key) is not None and not (isinstance(tree[key], (int, float)) and tree[key] > 0):
            raise UserError(f"{path}: {key} must be a number above 0, not {tree[key]!r}.")
    if chosen["sampler"] != "grid" and tree.get("trials") is None and tree.get("hours") is None:
        raise UserError(f"{path}: say when to end: trials, hours, or both.")
    base = recipe or (Path(tree["base"]) if tree.get("base") else None)
    settings = [*settings_of(path, "settings", tree.get("settings") or {}), *overrides]
    if not isinstance(tree["space"], Mapping):
        raise UserError(f"{path}: space must hold `section.key: values` lines, not {tree['space']!r}.")
    config = load_config([base] if base else [], settings)
    for key, values in tree["space"].items():
        for value in _ends(path, key, values, chosen["sampler"]):
            load_config([base] if base else [], [*settings, f"{key}={json.dumps(value)}"])
    if chosen["metric"] == "task_accuracy" and config.training.task_interval is None:
        raise UserError(f"{path}: no run measures task_accuracy. Set training.task_interval in settings.")
    return Sweep(
        name=str(tree["name"]),
        base=base,
        settings=settings,
        space=tree["space"],
        metric=chosen["metric"],
        sampler=chosen["sampler"],
        pruner=chosen["pruner"],
        trials=tree.get("trials"),
        hours=tree.get("hours"),
        seed=int(tree.get("seed") or 0),
        runs_dir=Path(config.training.runs_dir),
        first=int(getattr(config.training, _INTERVALS[chosen["metric"]])),
        last=None if "training.max_steps" in tree["space"] else config.training.max_steps,
    )


def _ends(path: Path, key: str, values: Any, sampler: str) -> list[Any]:
    """The choices, or the two ends of a range."""
    if isinstance(values, list) and values:
        return values
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= RANGE:
        raise UserError(f"{path}: space.{key} must be a list of values, or a range {{low, high, log, step}}.")
    low, high = values["low"], values["high"]
    if (
        not all(isinstance(end, (int, float)) for end in (low, high))
        or not low < high
        or (values.get("log") and low <= 0)
    ):
        raise UserError(f"{path}: space.{key}: low must be less than high, and above 0 with log.")
    if sampler == "grid":
        raise UserError(f"{path}: space.{key} is a range; a grid takes lists of values.")
    return [low, high]
