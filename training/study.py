"""What a search has tried and what it tries next, which outlives the process.

Optuna (Akiba et al., 2019, https://arxiv.org/abs/1907.10902) chooses what to try and which trials to end early: by the
median of the others at that step, or by Hyperband (Li et al., 2018, https://arxiv.org/abs/1603.06560), whose rungs lie
at the first measurement of a run, three times as many steps, nine times, and so on. What it knows is in an SQLite file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import UserError
from training.sweep import METRICS, Sweep

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.trial import Trial


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
        for values in itertools.product(*(map(_plain, choices) for choices in sweep.space.values())):
            study.enqueue_trial(dict(zip(sweep.space, values)), skip_if_exists=True)
    return study


def ask(study: Study, sweep: Sweep) -> Trial:
    """The next trial, which bears the name of its run.

    What it tries depends on the seed, on how many runs there are, and on how they came out, not on which process asks:
    a search that was interrupted goes on with the values that it would have come to.
    """
    import numpy as np
    from optuna import samplers

    tried = {trial.user_attrs.get("run") for trial in study.get_trials(False)} - {None}
    seed = int(np.random.SeedSequence([sweep.seed, len(tried)]).generate_state(1)[0])
    # The trials of a grid are all in the queue.
    study.sampler = samplers.TPESampler(seed=seed) if sweep.sampler == "tpe" else samplers.RandomSampler(seed=seed)
    trial = study.ask()
    trial.set_user_attr("run", trial.user_attrs.get("run") or f"{sweep.name}-{trial.number:03d}")
    return trial


def _pruner(sweep: Sweep) -> BasePruner:
    from optuna import pruners

    kinds: dict[str, Callable[[], BasePruner]] = {
        "median": pruners.MedianPruner,
        "hyperband": lambda: pruners.HyperbandPruner(
            sweep.first, max(sweep.last, sweep.first) if sweep.last else "auto"
        ),
        "none": pruners.NopPruner,
    }
    return kinds[sweep.pruner]()


def suggest(trial: Trial, space: Mapping[str, Any]) -> dict[str, Any]:
    """What `trial` is to try: a choice of a list; a whole number between whole ends; else any number between."""
    values: dict[str, Any] = {}
    for key, each in space.items():
        if isinstance(each, list):
            plain = [_plain(choice) for choice in each]
            values[key] = each[plain.index(trial.suggest_categorical(key, plain))]
            continue
        low, high, log, step = each["low"], each["high"], bool(each.get("log")), each.get("step")
        if isinstance(low, int) and isinstance(high, int):
            values[key] = trial.suggest_int(key, low, high, step=step or 1, log=log)
        else:
            values[key] = trial.suggest_float(key, low, high, step=step, log=log)
    return values


def _plain(choice: Any) -> Any:
    """A choice as a study holds it: a list or a mapping as JSON."""
    return json.dumps(choice) if isinstance(choice, (list, dict)) else choice


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
