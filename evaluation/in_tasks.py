"""A checkpoint measured in tasks of every kind: those of lm-eval, the project's own, and CORE."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.command import progress
from config.errors import UserError

if TYPE_CHECKING:
    from evaluation.downstream import TaskResult
    from evaluation.harness import Writing
    from evaluation.judged import Judged
    from evaluation.likelihood import Ids, Likelihood

CORE = "core"


def check_tasks(names: Sequence[str], folders: Sequence[Path], core_files: Path | None) -> None:
    """Raise `UserError` for what can be known to be wrong before the checkpoint is read."""
    from evaluation.task_names import check_names

    check_names([name for name in names if name != CORE], folders)
    if (CORE in names) != (core_files is not None):
        raise UserError(
            "--tasks core and --core-files go together: the folder is DCLM's evaluation bundle, which "
            "docs/evaluation.md says where to get."
        )
    if core_files is not None:
        from evaluation.core import read_bundle

        read_bundle(core_files)


def run_in_tasks(
    judged: Judged,
    names: Sequence[str],
    folders: Sequence[Path],
    core_files: Path | None,
    fewshot: int | None,
    limit: int | None,
    write: Callable[[Sequence[Writing]], list[str]],
) -> list[TaskResult]:
    """The results of the tasks, every process scoring its share, with bars on the first.

    `write` gives the texts that a task asks to be written.
    """
    from evaluation.core import read_bundle, run_core
    from evaluation.downstream import run_tasks
    from evaluation.harness import HarnessModel
    from evaluation.task_names import find_tasks, question_settings

    bars = progress()

    def score(pairs: Sequence[tuple[Ids, Ids]]) -> list[Likelihood]:
        bar = bars.add_task("Scoring answers", total=len(pairs))
        found = judged.score(pairs, lambda done: bars.advance(bar, done))
        bars.remove_task(bar)
        return found

    results: list[TaskResult] = []
    with bars if judged.rank == 0 else nullcontext():
        if others := [name for name in names if name != CORE]:
            tasks = find_tasks(others, folders, **question_settings(judged.info.config["data"]))
            model = HarnessModel(judged.tokenizer, judged.model.config.context_length, score, write)
            results += run_tasks(model, tasks, fewshot=fewshot, limit=limit)
        if core_files is not None:
            results += run_core(read_bundle(core_files, limit), judged.tokenizer, score)
    return results


def report_tasks(results: Sequence[TaskResult], judged: Judged, how: Mapping[str, Any], as_json: bool) -> None:
    """Write tasks.json into the run's folder, and print the results as a table or, if asked for, as JSON."""
    import json

    from evaluation.downstream import print_results, save_results

    about = {**judged.about, **how}
    files = judged.files("tasks")
    for path in files:
        save_results(results, path, about)
    if as_json:
        print(json.dumps({one.name: {**about, **one.to_dict()} for one in results}, indent=1, ensure_ascii=False))
    else:
        print_results(results, f"{judged.info.path} (step {judged.info.step:,})")
    where = sys.stderr if as_json else sys.stdout
    print(f"Written to {files[0]}. Next: python scripts/report.py", file=where)
