"""What is compared: a run, or one checkpoint of it, with the results of its evaluations.

Results are of a step: what was measured of one checkpoint is never put beside what was measured of another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config.errors import UserError
from evaluation.downstream import TASKS, read_results
from evaluation.report import STEPS
from evaluation.run_report import RunFiles, read_run


@dataclass(frozen=True, slots=True)
class Results:
    """Of one step: evaluations by the name of what they were on, and results of tasks by their name."""

    evaluations: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: dict[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A run, or a run up to one of its checkpoints: its files, and the results of the evaluated `step`, if any."""

    name: str
    files: RunFiles
    step: int | None
    results: Results

    @property
    def evaluations(self) -> Mapping[str, Mapping[str, Any]]:
        """By the name of what they were on."""
        return self.results.evaluations

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """By the name of the task."""
        return self.results.tasks


def open_subjects(places: Sequence[str], runs_dir: Path) -> list[Subject]:
    """What `places` name: folders of runs, or checkpoints of theirs. `UserError` for what is neither.

    A run has the results of its newest checkpoint that was evaluated. A checkpoint has its own, without which it is
    refused, and what its run had logged until then.
    """
    if len(places) < 2:
        raise UserError("Name two runs or more, such as python scripts/compare.py runs/a runs/b")
    named = [_find(place, runs_dir) for place in places]
    folders = {folder.resolve() for folder, _ in named}
    unlike = len({folder.name for folder in folders}) == len(folders)
    subjects: list[Subject] = []
    for place, (folder, step) in zip(places, named):
        one = _subject(place, folder, step, folder.name if unlike else str(folder))
        same = [other for other in subjects if other.files.directory.resolve() == folder.resolve()]
        if one.step in {other.step for other in same}:
            at = "" if one.step is None else f", of step {one.step}"
            raise UserError(f"{place} is the run {folder.name}{at}, which is named already.")
        subjects.append(one)
    return subjects


def _find(place: str, runs_dir: Path) -> tuple[Path, int | None]:
    """The folder of the run, and the step where `place` is a checkpoint."""
    path = Path(place)
    for folder in (path, runs_dir / place):
        if (folder / "config.yaml").is_file():
            return folder, None
    if not path.exists():
        raise UserError(f"There is no run and no checkpoint {place}. Runs are folders of {runs_dir}/.")
    from model.checkpoint import checkpoint_origin
    from model.checkpoint_folder import resolve_checkpoint

    name, step = checkpoint_origin(resolve_checkpoint(place, path))
    if not (runs_dir / name / "config.yaml").is_file():
        raise UserError(
            f"{place} is of the run {name}, whose folder {runs_dir / name} is not there. "
            "Set training.runs_dir to where it is."
        )
    return runs_dir / name, step


def _subject(place: str, folder: Path, step: int | None, name: str) -> Subject:
    files, found = read_run(folder), results_by_step(folder)
    if step is None:
        newest = max(found, default=None)
        return Subject(name, files, newest, Results() if newest is None else found[newest])
    if step not in found:
        raise UserError(
            f"{place}, step {step} of the run {folder.name}, is not evaluated yet. Do that, on the text and the tasks "
            f"of the others: python scripts/eval.py --checkpoint {place}"
        )
    files = replace(files, metrics=[row for row in files.metrics if row["step"] <= step])
    return Subject(f"{name} (step {step})", files, step, found[step])


def results_by_step(folder: Path) -> dict[int, Results]:
    """All results that the folder of a run holds: those of every step, and those measured last."""
    found: dict[int, Results] = {}
    for place in [*sorted((folder / STEPS).glob("step_*")), folder]:
        for path in sorted(place.glob("evaluation*.json")):
            one = json.loads(path.read_text(encoding="utf-8"))
            name = path.stem.removeprefix("evaluation").removeprefix("-") or "validation"
            found.setdefault(one["step"], Results()).evaluations[name] = one
        for task, one in read_results(place / TASKS).items():
            found.setdefault(one["step"], Results()).tasks[task] = one
    return found
