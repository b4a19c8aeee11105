"""Tasks of `lm-eval` on a model: what is run, and what is kept of it.

Besides the figures the outcome of every document is kept, in its order. So two models that answered the same
questions can be compared question by question.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config.files import write_text
from evaluation.bootstrap import ratio_interval

TASKS = "tasks.json"
_FEWSHOT_SEED, _PYTHON_SEED, _NUMPY_SEED = 1234, 0, 1234  # those of lm-eval's own command


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a task, its 95 % interval where it can be told, and what each document contributed."""

    value: float
    interval: tuple[float, float] | None = None
    documents: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model reached in a task. `fingerprint` is that of the documents; None for a group of tasks."""

    name: str
    metrics: Mapping[str, Metric]
    documents: int
    fewshot: int | None
    fingerprint: str | None
    group: str | None = None
    """The group it was run as a part of."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else there is to say of how it was measured."""
    note: str = ""
    """What a reader of the table must know."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            **self.about,
            "documents": self.documents,
            "fewshot": self.fewshot,
            "fingerprint": self.fingerprint,
            "group": self.group,
            "metrics": {name: {"value": one.value, "interval": one.interval} for name, one in self.metrics.items()},
            "outcomes": {name: one.documents for name, one in self.metrics.items() if one.documents is not None},
        }


def run_tasks(
    model: Any, tasks: dict[str, Any], *, fewshot: int | None = None, limit: int | None = None
) -> list[TaskResult]:
    """The results of `tasks` (of `find_tasks`) on `model` (a `HarnessModel`), each group before its members.

    `fewshot` examples stand before each question, where a task leaves that open; `limit` takes the first documents of
    every task alone.
    """
    import lm_eval.api.task
    from lm_eval.evaluator import evaluate

    lm_eval.api.task.tqdm = lambda items, **_: items  # a bar for every task, for a moment, whoever reads along
    random.seed(_PYTHON_SEED)
    np.random.seed(_NUMPY_SEED)
    for task in tasks["tasks"].values():
        given = task.get_config("num_fewshot")
        if given is None or (fewshot is not None and given != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    found = evaluate(lm=model, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None
    results = list(_results(found))
    groups = [one for one in results if one.fingerprint is None]
    alone = [one for one in results if one.fingerprint is not None and one.group is None]
    return alone + [each for one in groups for each in (one, *(part for part in results if part.group == one.name))]


def _results(found: Any) -> Iterator[TaskResult]:
    parents = {child: group for group, children in found["group_subtasks"].items() for child in children}
    for name, figures in found["results"].items():
        samples = sorted(found["samples"].get(name, []), key=lambda sample: int(sample["doc_id"]))
        metrics = {}
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            outcomes = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
            metrics[metric if kind == "none" else key] = _metric(float(value), outcomes)
        if not metrics:
            continue
        hashes = dict.fromkeys((sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in samples)
        yield TaskResult(
            name=name,
            metrics=metrics,
            documents=len(hashes),
            fewshot=found["n-shot"].get(name),
            fingerprint=hashlib.sha256(json.dumps([*hashes]).encode()).hexdigest()[:16] if samples else None,
            group=parents.get(name),
        )


def _metric(value: float, outcomes: Sequence[Any]) -> Metric:
    """The interval of a mean, of the perplexity of a mean, or of either where documents have weights."""
    try:
        pairs = np.array([one if isinstance(one, (tuple, list)) else (one, 1.0) for one in outcomes], dtype=np.float64)
    except (TypeError, ValueError):
        return Metric(value)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not pairs[:, 1].any():
        return Metric(value)
    mean = float(pairs[:, 0].sum() / pairs[:, 1].sum())
    interval = ratio_interval(pairs[:, 0], pairs[:, 1])
    documents = pairs[:, 0].tolist() if (pairs[:, 1] == 1.0).all() else None
    for form in (lambda x: x, lambda x: -x / math.log(2), lambda x: math.exp(min(-x, 700.0))):
        if math.isclose(form(mean), value, rel_tol=1e-9, abs_tol=1e-12):
            low_high = None if interval is None else tuple(sorted(map(form, interval)))
            return Metric(value, low_high, documents)
    return Metric(value)


def save_results(results: Sequence[TaskResult], path: Path, about: Mapping[str, Any]) -> None:
    """Enter the results into the file `path`, beside those of other tasks; `about` says what was measured."""
    kept: dict[str, Any] = read_results(path)
    for result in results:
        kept[result.name] = {**about, **result.to_dict()}
    write_text(path, json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """The results that `tasks.json` holds, by task; none where there is no such file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def print_results(results: Sequence[TaskResult], title: str) -> None:
    """The figures as a table on standard output, members of a group under it."""
    from rich.table import Table

    from config.command import table_console

    table = Table()
    for column in ("task", "metric", "value", "95 % interval", "documents", "few-shot"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for result in results:
        first = True
        for name, metric in result.metrics.items():
            interval = "" if metric.interval is None else f"{metric.interval[0]:.4f} to {metric.interval[1]:.4f}"
            label = ("  " if result.group else "") + result.name if first else ""
            counts = (
                (f"{result.documents:,}" if result.documents else "", str(result.fewshot or 0)) if first else ("", "")
            )
            table.add_row(label, name, f"{metric.value:.4f}", interval, *counts)
            first = False
    print(title)
    table_console().print(table)
    for result in results:
        if result.note:
            print(result.note)
