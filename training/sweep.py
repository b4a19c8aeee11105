"""The file that describes a search over settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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

    Raises `UserError` for unknown keys, with the nearest, for an empty space, for values that a setting cannot have
    (of a grid, also for combinations), for ranges that there are not, and for a metric that the runs would not measure.
    """
    optional = ["base", "settings", "metric", "sampler", "pruner", "trials", "hours", "seed"]
    tree = read_experiment(path, ["name", "space"], optional)
    chosen = {"metric": "validation_loss", "sampler": "tpe", "pruner": "none", "seed": 0, **tree}
    for key, known in (("metric", METRICS), ("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if chosen[key] not in known:
            raise UserError(f"{path}: there is no {key} {chosen[key]!r}.{nearest(str(chosen[key]), known)}")
    for key, kind in (("trials", int), ("hours", (int, float))):
        if tree.get(key) is not None and not (_is_number(tree[key], kind) and tree[key] > 0):
            whole = "whole " if kind is int else ""
            raise UserError(f"{path}: {key} must be a {whole}number above 0, not {tree[key]!r}.")
    if not _is_number(chosen["seed"], int) or chosen["seed"] < 0:
        raise UserError(f"{path}: seed must be a whole number, 0 or above, not {chosen['seed']!r}.")
    if chosen["sampler"] != "grid" and tree.get("trials") is None and tree.get("hours") is None:
        raise UserError(f"{path}: say when to end: trials, hours, or both.")
    base = recipe or (Path(tree["base"]) if tree.get("base") else None)
    settings = [*settings_of(path, "settings", tree.get("settings") or {}), *overrides]
    if not isinstance(tree["space"], Mapping):
        raise UserError(f"{path}: space must hold `section.key: values` lines, not {tree['space']!r}.")
    config = load_config([base] if base else [], settings)
    ends = {key: _ends(path, key, values, chosen["sampler"]) for key, values in tree["space"].items()}
    for tried in _together(ends) if chosen["sampler"] == "grid" else _alone(ends):
        try:
            load_config([base] if base else [], [*settings, *settings_of(path, "space", tried)])
        except UserError as error:
            shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in tried.items())
            raise UserError(f"{path}: no run can be made with {shown}: {error}") from error
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
        seed=chosen["seed"],
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
    low, high, log, step = values["low"], values["high"], values.get("log", False), values.get("step")
    whole = isinstance(low, int) and isinstance(high, int)
    if not (_is_number(low) and _is_number(high)) or not low < high or (log and low <= 0):
        wrong = "low and high must be numbers, low less than high, and above 0 with log"
    elif not isinstance(log, bool):
        wrong = f"log must be true or false, not {log!r}"
    elif step is not None and log:
        wrong = "step and log do not go together"
    elif step is not None and not (_is_number(step, int if whole else (int, float)) and 0 < step <= high - low):
        wrong = f"step must be a {'whole ' if whole else ''}number above 0 that fits between the ends, not {step!r}"
    elif sampler == "grid":
        wrong = "this is a range; a grid takes lists of values"
    else:
        return [low, high]
    raise UserError(f"{path}: space.{key}: {wrong}.")


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _alone(choices: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every value by itself."""
    return ({key: value} for key, values in choices.items() for value in values)


def _together(choices: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination."""
    return (dict(zip(choices, values)) for values in product(*choices.values()))
