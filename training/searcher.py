"""The runs of a search: started where there is room, watched, and ended early where the study says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from config.errors import UserError
from training.experiment import PlannedRun
from training.study import ask, suggest
from training.sweep import Sweep

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

POLL = 0.5  # seconds between looks at what the runs have logged
NOTE = 30.0  # seconds of searching until the study learns of them


class Process(Protocol):
    """A run under way, as `subprocess.Popen` shows it. `terminate` asks it to save and stop."""

    @property
    def returncode(self) -> int | None:
        """The exit status that `poll` or `wait` found."""

    def poll(self) -> int | None:
        """The exit status; None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self) -> int:
        """Wait for its end."""


Place = Callable[[PlannedRun], Process]


class Searcher:
    """Tries what the study asks for, at most one run at a time in each of `places`, which start them."""

    def __init__(self, sweep: Sweep, study: Study, places: Sequence[Place], say: Callable[[str], None]) -> None:
        self.sweep, self.study, self.say = sweep, study, say
        self.free = list(places)
        self.running: list[tuple[Trial, PlannedRun, Process, Place]] = []
        self.noted = float(study.user_attrs.get("seconds", 0.0))
        self.since = time.monotonic()
        self.failed = 0

    @property
    def seconds(self) -> float:
        """Of searching, in all starts of this sweep together."""
        return self.noted + time.monotonic() - self.since

    def _note(self) -> None:
        self.noted, self.since = self.seconds, time.monotonic()
        self.study.set_user_attr("seconds", self.noted)

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
                if time.monotonic() - self.since > NOTE:
                    self._note()
                time.sleep(POLL)
        finally:
            self._note()
            for _, _, process, _ in self.running:
                process.terminate()
            for _, _, process, _ in self.running:
                process.wait()

    def _more(self) -> bool:
        from optuna.trial import TrialState

        if self.sweep.hours is not None and self.seconds > 3600 * self.sweep.hours:
            return False
        done = self.study.get_trials(False, (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
        if self.sweep.trials is not None and len(done) >= self.sweep.trials:
            return False
        return self.sweep.sampler != "grid" or bool(self.study.get_trials(False, (TrialState.WAITING,)))

    def _begin(self) -> None:
        trial = ask(self.study, self.sweep)
        run = self.sweep.run(trial.user_attrs["run"], suggest(trial, self.sweep.space))
        place = self.free.pop()
        self.running.append((trial, run, place(run), place))

    def _look(self, trial: Trial, run: PlannedRun, process: Process, place: Place) -> None:
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
        finished = not pruned and process.returncode == 0 and run.result is not None
        diverged = finished and not math.isfinite(last := self._last(run, found))
        self.failed = 0 if pruned or finished else self.failed + 1
        if pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"{run.name}  {values}  ended early at step {max(found)}: {metric} {found[max(found)]:.4f}")
        elif diverged:
            trial.report(math.nan, max(row["step"] for row in run.rows))
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"{run.name}  {values}  diverged: its last {metric} is not a number")
        elif finished:
            self.study.tell(trial, last)
            self.say(f"{run.name}  {values}  {metric} {last:.4f}")
        else:
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"{run.name}  {values}  {run.failure()}")
            if self.failed == 3:
                raise UserError(f"Three runs in a row failed, so the sweep ends here. {run.failure()}")

    def _last(self, run: PlannedRun, found: Mapping[int, float]) -> float:
        """What a finished run came to. A loss that is not a number is null in its files, as if it were not measured."""
        value: float | None = found[max(found)] if found else None
        if self.sweep.metric == "validation_loss" and run.result is not None:
            value = run.result["validation_loss"]
        elif self.sweep.metric == "loss":
            value = run.rows[-1]["loss"]
        return math.nan if value is None else value
