"""Command: search over settings by many runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run, table_console

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from optuna import Study

    from training.searcher import Place
    from training.sweep import Sweep

File = Annotated[
    Path, typer.Argument(metavar="SWEEP.yaml", help="Which settings, which values, and how long.", show_default=False)
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Runs at a time. Default: one for each GPU, or one."),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="auto|HOST:PORT", help="Run on a Ray cluster, as many at a time as it has room for."),
]
Cores = Annotated[
    int, typer.Option("--cores", min=1, help="Cores of each run on a Ray cluster, which also gives it a GPU, if any.")
]


def sweep(
    file: File,
    overrides: Overrides = None,
    processes: Processes = None,
    ray: Ray = None,
    cores: Cores = 1,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Search for the settings that bring a metric furthest, by runs of scripts/train.py.

    Every trial is an ordinary run in runs/. Interrupt it, even with kill -9, and type
    the same command again: trials that were running go on. --config lies under the
    settings of the file, in the place of its base; SECTION.KEY=VALUE over them.
    """
    if print_config:
        resolve(recipe, overrides, print_config)
    from contextlib import nullcontext

    from config.files import exclusive
    from training.searcher import Searcher
    from training.study import open_study, plot_study
    from training.sweep import read_sweep

    plan = read_sweep(file, overrides or [], recipe)
    with exclusive(plan.directory / "study.db", f"The sweep {plan.name} is under way in another process."):
        study = open_study(plan)
        try:
            with _cluster(ray, cores, processes) if ray else nullcontext(_places(processes)) as places:
                Searcher(plan, study, places, print).search()
        finally:
            _show(plan, study)
        for path in plot_study(study, plan.directory):
            print(f"Wrote {path}.")


def _cluster(address: str, cores: int, processes: int | None) -> AbstractContextManager[list[Place]]:
    from training.on_ray import places_on_ray

    return places_on_ray(address, cores, processes)


def _places(processes: int | None) -> list[Place]:
    """What starts the runs that go on at a time: with a GPU for each, where there are any."""
    import os

    import torch

    def place(environment: dict[str, str]) -> Place:
        return lambda run: run.start(environment)

    gpus = torch.cuda.device_count()
    if not gpus:
        return [place({})] * (processes or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    return [place({"CUDA_VISIBLE_DEVICES": names[number % gpus]}) for number in range(processes or gpus)]


def _show(plan: Sweep, study: Study) -> None:
    """The trials, best first."""
    from math import isnan

    from optuna.trial import TrialState
    from rich.table import Table

    trials = study.get_trials(False, (TrialState.COMPLETE, TrialState.PRUNED))
    if not trials:
        return
    sign = 1 if plan.metric != "task_accuracy" else -1
    complete = TrialState.COMPLETE
    trials.sort(key=lambda trial: (trial.state != complete, sign * (trial.value or 0.0), trial.number))
    table = Table("run", *plan.space, plan.metric, "steps", title=f"The sweep {plan.name}, best first")
    for trial in trials:
        values = [
            f"{trial.params[key]:.4g}" if isinstance(trial.params[key], float) else str(trial.params[key])
            for key in plan.space
        ]
        steps = max(trial.intermediate_values, default=0)
        value = f"{trial.value:.4f}" if trial.value is not None else "-"
        ended = ", diverged" if isnan(trial.intermediate_values.get(steps, 0.0)) else ", ended early"
        table.add_row(trial.user_attrs["run"], *values, value, f"{steps:,}{'' if trial.state == complete else ended}")
    table_console().print(table)


def main() -> None:
    """Run the command."""
    run(sweep)


if __name__ == "__main__":
    main()
