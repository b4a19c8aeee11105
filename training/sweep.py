"""A search over settings: which there are, the trials so far, and the runs that try them.

Optuna (Akiba et al., 2019, https://arxiv.org/abs/1907.10902) chooses what to try and which trials to end early; what it
knows is in an SQLite file, which outlives the process. Every trial is an ordinary run.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config.errors import UserError
from config.load import load_config, nearest
from training.experiment import PlannedRun, read_experiment, settings_of

if TYPE_CHECKING:
    import subprocess

    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

METRICS: dict[str, Literal["minimize", "maximize"]] = {
    "validation_loss": "minimize",
    "loss": "minimize",
    "task_accuracy": "maximize",
}
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "hyperband", "none")
RANGE = {"low", "high", "log", "step"}
POLL = 0.5  # seconds between looks at what the runs have logged


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the file says; `space` is a list of choices or a range for each setting."""

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


def open_study(sweep: Sweep) -> Study:
    """The study of `sweep`, new or as it was left: trials that were running have failed, and are tried again.

    Such a trial goes on from the last checkpoint of its run. Raises `UserError` where the study in that folder was
    begun with another space, metric or settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{sweep.directory / 'study.db'}",
        study_name=sweep.name,
        direction=METRICS[sweep.metric],
        sampler=_sampler(sweep),
        pruner=_pruner(sweep),
        load_if_exists=True,
    )
    about = {"space": sweep.space, "metric": sweep.metric, "settings": list(sweep.settings), "base": str(sweep.base)}
    if study.user_attrs.get("about", about) != json.loads(json.dumps(about)):
        raise UserError(
            f"The study in {sweep.directory} was begun with another base, space, metric or settings. "
            "Give the sweep another name, or delete that folder."
        )
    study.set_user_attr("about", about)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs.get("run")})
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    if sweep.sampler == "grid":
        for values in itertools.product(*sweep.space.values()):
            study.enqueue_trial(dict(zip(sweep.space, values)), skip_if_exists=True)
    return study


def _sampler(sweep: Sweep) -> BaseSampler:
    from optuna import samplers

    if sweep.sampler in ("random", "grid"):  # the trials of a grid are all in the queue
        return samplers.RandomSampler(seed=sweep.seed)
    return samplers.TPESampler(seed=sweep.seed)


def _pruner(sweep: Sweep) -> BasePruner:
    from optuna import pruners

    kinds: dict[str, Callable[[], BasePruner]] = {
        "median": pruners.MedianPruner,
        "hyperband": pruners.HyperbandPruner,
        "none": pruners.NopPruner,
    }
    return kinds[sweep.pruner]()


def suggest(trial: Trial, space: Mapping[str, Any]) -> dict[str, Any]:
    """What `trial` is to try: a choice of a list; a whole number between whole ends; else any number between."""
    values: dict[str, Any] = {}
    for key, each in space.items():
        if isinstance(each, list):
            values[key] = trial.suggest_categorical(key, each)
            continue
        low, high, log, step = each["low"], each["high"], bool(each.get("log")), each.get("step")
        if isinstance(low, int) and isinstance(high, int):
            values[key] = trial.suggest_int(key, low, high, step=step or 1, log=log)
        else:
            values[key] = trial.suggest_float(key, low, high, step=step, log=log)
    return values


class Searcher:
    """Tries what the study asks for, at most one run at a time in each of `places`, the environments of the runs."""

    def __init__(
        self, sweep: Sweep, study: Study, places: Sequence[Mapping[str, str]], say: Callable[[str], None]
    ) -> None:
        self.sweep, self.study, self.say = sweep, study, say
        self.free = list(places)
        self.running: list[tuple[Trial, PlannedRun, subprocess.Popen[bytes], Mapping[str, str]]] = []
        self.started = time.monotonic()
        self.failed = 0

    def search(self) -> None:
        """Until the budget is spent. An interruption stops the runs with a checkpoint; they go on the next time.

        Raises `UserError` where three runs in a row fail.
        """
        try:
            while self._more() or self.running:
                while self.free and self._more():
                    self._begin()
                for one in list(self.running):
                    self._look(*one)
                time.sleep(POLL)
        finally:
            for _, _, process, _ in self.running:
                process.terminate()
            for _, _, process, _ in self.running:
                process.wait()

    def _more(self) -> bool:
        from optuna.trial import TrialState

        if self.sweep.hours is not None and time.monotonic() - self.started > 3600 * self.sweep.hours:
            return False
        done = self.study.get_trials(False, (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
        if self.sweep.trials is not None and len(done) >= self.sweep.trials:
            return False
        return self.sweep.sampler != "grid" or bool(self.study.get_trials(False, (TrialState.WAITING,)))

    def _begin(self) -> None:
        trial = self.study.ask()
        name = trial.user_attrs.get("run") or f"{self.sweep.name}-{trial.number:03d}"
        trial.set_user_attr("run", name)
        run = self.sweep.run(name, suggest(trial, self.sweep.space))
        place = self.free.pop()
        self.running.append((trial, run, run.start(place), place))

    def _look(self, trial: Trial, run: PlannedRun, process: subprocess.Popen[bytes], place: Mapping[str, str]) -> None:
        """Tell the study what the run has logged since, and how it ended, if it has."""
        from optuna.trial import TrialState

        ended = process.poll() is not None
        metric = self.sweep.metric
        found = {row["step"]: row[metric] for row in run.rows if row.get(metric) is not None}
        known = self.study.get_trials(False)[trial.number].intermediate_values
        for step, value in found.items():
            if step not in known:
                trial.report(value, step)
        pruned = not ended and bool(found) and trial.should_prune()
        if not (ended or pruned):
            return
        if pruned:
            process.terminate()
            process.wait()
        self.running.remove((trial, run, process, place))
        self.free.append(place)
        values = ", ".join(f"{key}={value}" for key, value in trial.params.items())
        if pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"{run.name}  {values}  ended early at step {max(found)}: {metric} {found[max(found)]:.4f}")
        elif process.returncode == 0 and run.result is not None and found:
            self.study.tell(trial, found[max(found)])
            self.failed = 0
            self.say(f"{run.name}  {values}  {metric} {found[max(found)]:.4f}")
        else:
            self.study.tell(trial, state=TrialState.FAIL)
            self.failed += 1
            self.say(f"{run.name}  {values}  {run.failure()}")
            if self.failed == 3:
                raise UserError(f"Three runs in a row failed, so the sweep ends here. {run.failure()}")


def plot_study(study: Study, directory: Path) -> list[Path]:
    """`parallel-coordinates.png`, and `importance.png` where two trials or more can tell what matters."""
    import matplotlib

    matplotlib.use("Agg")
    import warnings

    from matplotlib import pyplot
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots

    from config.files import atomic_write

    done = study.get_trials(False, (TrialState.COMPLETE,))
    wanted: dict[str, Callable[[Study], object]] = (
        {"parallel-coordinates.png": plots.plot_parallel_coordinate} if done else {}
    )
    if len({trial.value for trial in done}) > 1:
        wanted["importance.png"] = plots.plot_param_importances
    written = []
    for name, plot in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plot(study)
        with atomic_write(directory / name) as file:
            pyplot.gcf().savefig(file, format="png", dpi=120, bbox_inches="tight")
        pyplot.close("all")
        written.append(directory / name)
    return written
