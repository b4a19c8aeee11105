"""scripts/sweep.py: trials are ordinary runs, poor ones end early, and a sweep that is killed goes on."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna import Study
from optuna.trial import TrialState

from config.errors import UserError
from scripts.sweep import _show
from tests.commands import here
from tests.small_runs import SMALL, kill_when, metrics, start, write_corpus
from training.experiment import PlannedRun
from training.searcher import Searcher
from training.study import ask, open_study, plot_study, suggest
from training.sweep import Sweep, read_sweep

SWEEP: dict[str, Any] = {
    "name": "rates",
    "settings": {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in SMALL)},
    "space": {"training.muon.learning_rate": [0.0001, 0.02], "training.gradient_clip": [1.0]},
    "sampler": "grid",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**changes: Any) -> Path:
    Path("sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))
    return Path("sweep.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trails": 3}, "there is no key 'trails'. Did you mean 'trials'?"),
        ({"space": {}}, "the key 'space' is missing or empty"),
        ({"space": {"training.seeed": [1, 2]}}, "there is no such key. Did you mean 'seed'?"),
        ({"space": {"training.seed": []}}, "space.training.seed must be a list of values, or a range"),
        ({"space": {"training.optimizer": ["muon", "sgd"]}}, "'sgd' is not allowed"),
        ({"space": {"training.seed": {"low": 1, "high": 3}}}, "is a range; a grid takes lists"),
        ({"space": {"training.seed": {"low": 3, "high": 1}}}, "low and high must be numbers, low less than high"),
        ({"space": {"training.seed": {"low": True, "high": 3}}}, "low and high must be numbers"),
        ({"space": {"training.gradient_clip": {"low": 0.5, "high": float("inf")}}}, "low and high must be numbers"),
        ({"space": {"training.seed": {"low": 1, "high": 9, "log": True, "step": 2}}}, "do not go together"),
        ({"space": {"training.seed": {"low": 1, "high": 9, "log": "yes"}}}, "log must be true or false, not 'yes'"),
        ({"space": {"training.seed": {"low": 1, "high": 9, "step": 0.5}}}, "step must be a whole number above 0"),
        ({"space": {"training.seed": {"low": 1, "high": 9, "step": -1}}}, "step must be a whole number above 0"),
        ({"space": {"training.gradient_clip": {"low": 0.5, "high": 2.0, "step": 0}}}, "step must be a number above 0"),
        ({"space": {"model.d_model": [16, 24], "model.n_heads": [1, 2, 8]}}, "with model.d_model=24, model.n_heads=8"),
        ({"metric": "validation_los"}, "there is no metric 'validation_los'. Did you mean 'validation_loss'?"),
        ({"metric": "task_accuracy"}, "no run measures task_accuracy. Set training.task_interval"),
        ({"sampler": "random"}, "say when to end: trials, hours, or both"),
        ({"trials": -1}, "trials must be a whole number above 0"),
        ({"trials": 2.5}, "trials must be a whole number above 0, not 2.5"),
        ({"hours": "two"}, "hours must be a number above 0"),
        ({"seed": "abc"}, "seed must be a whole number, 0 or above, not 'abc'"),
        ({"seed": -1}, "seed must be a whole number, 0 or above, not -1"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_any_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_sweep(write(**changes))
    assert not Path("runs").exists()


def test_values_come_from_the_space_and_a_study_of_another_is_refused() -> None:
    space = {
        "training.muon.learning_rate": {"low": 0.001, "high": 0.1, "log": True},
        "model.n_layers": {"low": 2, "high": 6, "step": 2},
        "training.optimizer": ["muon", "adamw"],
    }
    sweep = read_sweep(write(space=space, sampler="tpe", trials=9))
    study = open_study(sweep)
    tried = [suggest(ask(study, sweep), space) for _ in range(20)]
    assert {each["model.n_layers"] for each in tried} == {2, 4, 6}
    assert {each["training.optimizer"] for each in tried} == {"muon", "adamw"}
    rates = [each["training.muon.learning_rate"] for each in tried]
    assert all(0.001 <= rate <= 0.1 for rate in rates) and sum(rate < 0.01 for rate in rates) >= 4
    again = open_study(read_sweep(write(space=space, sampler="tpe", trials=12)))
    states = [trial.state.name for trial in again.get_trials()]
    assert states == ["FAIL"] * 20 + ["WAITING"] * 20
    retried = ask(again, sweep)
    assert suggest(retried, space) == tried[0] and retried.user_attrs["run"] == "rates-000"
    with pytest.raises(UserError, match="was begun with another base, space, metric or settings"):
        open_study(read_sweep(write(space={**space, "model.n_layers": [2]}, sampler="tpe", trials=9)))


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 12), ("random", 4)])
def test_an_interrupted_search_goes_on_with_the_values_it_would_have_come_to(sampler: str, trials: int) -> None:
    """The first ten trials are random with tpe, too. The second of the search and the last but one are interrupted."""
    space = {"training.muon.learning_rate": {"low": 0.001, "high": 0.1, "log": True}, "model.n_layers": [2, 4, 6]}

    def searched(name: str, interrupted: bool) -> list[dict[str, Any]]:
        sweep = read_sweep(write(name=name, space=space, sampler=sampler, trials=trials))
        study, tried = open_study(sweep), []
        for number in range(trials):
            trial = ask(study, sweep)
            values = suggest(trial, space)
            if interrupted and number in (1, trials - 2):
                study = open_study(sweep)
                trial = ask(study, sweep)
                assert suggest(trial, space) == values
            study.tell(trial, values["training.muon.learning_rate"] * values["model.n_layers"])
            tried.append(values)
        return tried

    whole = searched("whole", False)
    assert searched("parts", True) == whole
    assert len({each["training.muon.learning_rate"] for each in whole}) == trials


def test_a_trial_worse_than_the_median_of_five_is_ended_early() -> None:
    sweep = read_sweep(write(sampler="tpe", pruner="median", trials=6))
    study = open_study(sweep)
    for _ in range(5):
        trial = ask(study, sweep)
        suggest(trial, sweep.space)
        trial.report(1.0, 4)
        study.tell(trial, 1.0)
    trial = ask(study, sweep)
    run = sweep.run("rates-005", suggest(trial, sweep.space))
    run.directory.mkdir(parents=True)
    (run.directory / "metrics.jsonl").write_text(json.dumps({"step": 4, "validation_loss": 9.0}) + "\n")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    said: list[str] = []
    searcher = Searcher(sweep, study, [], said.append)
    searcher.running.append((trial, run, process, PlannedRun.start))
    searcher.search()
    assert process.returncode == -signal.SIGTERM and "ended early at step 4: validation_loss 9.0000" in said[0]
    assert study.trials[5].state.name == "PRUNED"


End = tuple[dict[int, float | None], dict[str, Any] | None]  # losses by step, and the result of a run that did not fail
GOOD: End = {4: 6.0, 8: 5.0}, {"step": 8, "validation_loss": 5.0}
LOST: End = {4: 1.0, 8: None}, {"step": 8, "validation_loss": math.nan}
FAILS: End = {4: 5.0}, None


class Ended:
    """The process of a run that has come to its end."""

    def __init__(self, run: PlannedRun, losses: dict[int, float | None], result: dict[str, Any] | None) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"step": step, "validation_loss": loss}) + "\n" for step, loss in losses.items()]
        (run.directory / "metrics.jsonl").write_text("".join(rows))
        if result is not None:
            (run.directory / "result.json").write_text(json.dumps(result))
        self.returncode = 1 if result is None else 0

    def poll(self) -> int:
        return self.returncode

    def wait(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        raise AssertionError("has ended")


def searched(sweep: Sweep, ends: Iterator[End]) -> tuple[Study, str]:
    """The study after a search whose runs come to these ends, and what was said."""
    study, said = open_study(sweep), list[str]()
    Searcher(sweep, study, [lambda run: Ended(run, *next(ends))], said.append).search()
    return study, "\n".join(said)


def test_a_run_that_diverged_is_not_the_best_by_its_last_finite_loss(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read_sweep(write())
    study, said = searched(sweep, iter([LOST, GOOD]))
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"] and study.best_value == 5.0
    assert "diverged: its last validation_loss is not a number" in said
    _show(sweep, study)
    assert re.search(r"rates-000 │.*│ - +│ 8, diverged", capsys.readouterr().out)


def test_three_runs_that_fail_end_a_sweep_only_where_none_between_them_did_not() -> None:
    space = {"training.seed": [1, 2, 3, 4, 5]}
    study, _ = searched(read_sweep(write(space=space)), iter([FAILS, LOST, FAILS, LOST, FAILS]))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "PRUNED"] * 2 + ["FAIL"]
    with pytest.raises(UserError, match="Three runs in a row failed"):
        searched(read_sweep(write(name="worse", space=space)), iter([FAILS] * 5))


def test_hours_are_those_of_all_starts_together() -> None:
    space = {"training.seed": {"low": 1, "high": 99}}
    study, _ = searched(read_sweep(write(space=space, sampler="random", trials=1)), iter([GOOD]))
    spent = study.user_attrs["seconds"]
    assert spent > 0
    study, _ = searched(read_sweep(write(space=space, sampler="random", hours=spent / 3600)), iter([GOOD]))
    assert len(study.trials) == 1 and study.user_attrs["seconds"] > spent


def test_choices_may_be_lists() -> None:
    space = {"data.use": [["sample"], ["sample", "tinystories"]], "training.seed": [1]}
    sweep = read_sweep(write(space=space))
    study, said = searched(sweep, iter([GOOD, GOOD]))
    assert [trial.params["data.use"] for trial in study.trials] == ['["sample"]', '["sample", "tinystories"]']
    assert plot_study(study, sweep.directory)


def test_hyperband_ends_poor_trials_at_its_rungs_and_spends_the_rest_on_good_ones() -> None:
    """27 trials whose order never changes, measured every 4 of 36 steps: the rungs lie at 4, 12 and 36."""
    settings = {**SWEEP["settings"], "training.max_steps": 36}
    study = open_study(read_sweep(write(settings=settings, sampler="random", pruner="hyperband", trials=27)))
    ended: dict[int, list[int]] = {}
    for number in range(27):
        trial, quality = study.ask(), (number * 7) % 27
        for step in range(4, 37, 4):
            trial.report(5.0 + quality - step / 100, step)
            if trial.should_prune():
                break
        pruned = step < 36
        study.tell(trial, None if pruned else 5.0 + quality, state=TrialState.PRUNED if pruned else TrialState.COMPLETE)
        ended.setdefault(step, []).append(quality)
    assert set(ended) == {4, 12, 36}
    assert min(ended[36]) == 0 and sum(ended[4]) / len(ended[4]) > sum(ended[36]) / len(ended[36])
    assert study.best_value == 5.0


@pytest.mark.slow
def test_a_sweep_killed_while_a_trial_runs_goes_on_and_finds_the_better_rate(folder: Path) -> None:
    write_corpus(folder)
    file = write()
    process = start(folder, "sweep", str(file))
    kill_when(lambda: Path("runs/rates-001").exists(), process)
    first = Path("runs/rates-000/environment.json").read_bytes()
    done = here(folder, "scripts/sweep.py", str(file))
    assert Path("runs/rates-000/environment.json").read_bytes() == first
    losses = {run: metrics(Path(f"runs/rates-00{run}"))[-1]["validation_loss"] for run in (0, 1)}
    best = min(losses, key=losses.__getitem__)
    rows = re.findall(r"│ rates-00(\d) │ 1 +│ (\S+) +│ ([\d.]+) +│ 8 +│", done.stdout)
    assert [int(row[0]) for row in rows] == [best, 1 - best] and rows[0][1] == "0.02"
    assert rows[0][2] == f"{losses[best]:.4f}"
    for name in ("parallel-coordinates", "importance"):
        assert Path(f"runs/rates/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("runs/rates-002").exists()
    assert "rates-00" not in here(folder, "scripts/sweep.py", str(file)).stdout.split("best first")[0]
