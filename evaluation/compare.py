"""Runs side by side: what they were set to, what they cost, what they reached, and how surely one is better.

A difference is judged on what both were asked: the same blocks of the same text, the same questions of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.bootstrap import Difference, mean_ratio_difference, ratio_difference
from evaluation.report import BLOCKS
from evaluation.subjects import Subject

AXES = {"step": "steps", "tokens": "tokens", "flops": "floating-point operations", "seconds": "seconds"}
EVALUATED = "evaluated at step"
_TEXT_FIGURES = {"loss": ("loss", "tokens"), "bits_per_byte": ("text_loss", "bytes")}
_NOT_COMPARED = {"training.run_name", "training.runs_dir", "training.checkpoint_dir"}


class Judgement(NamedTuple):
    """How the figure `what` of run `other` differs from that of the first; `reason` says why it cannot be told."""

    what: str
    other: str
    before: float
    after: float
    difference: Difference | None
    reason: str = ""


class Reached(NamedTuple):
    """When a run's validation loss first came down to a target, by every axis; None where it is not known."""

    name: str
    at: Mapping[str, float | None]


def figures(subjects: Sequence[Subject]) -> list[tuple[str, list[float | None]]]:
    """What the runs took and reached, as (label, value of each run); only what any of them has."""

    def row(label: str, value: Callable[[Subject], Any]) -> tuple[str, list[float | None]]:
        return label, [value(subject) for subject in subjects]

    def last(key: str) -> Callable[[Subject], Any]:
        return lambda subject: subject.files.last(key)

    def on_text(name: str, figure: str) -> Callable[[Subject], Any]:
        return lambda subject: subject.evaluations.get(name, {}).get(figure)

    def in_task(task: str, metric: str) -> Callable[[Subject], Any]:
        return lambda subject: _task_value(subject, task, metric)

    texts = dict.fromkeys(name for subject in subjects for name in subject.evaluations)
    found = [
        *(row(label, last(key)) for key, label in AXES.items()),
        row("training loss, last", last("loss")),
        row("validation loss, last", last("validation_loss")),
        row("accuracy in questions, last", last("task_accuracy")),
        row("validation loss, lowest", lambda subject: min(_losses(subject), default=None)),
        row(EVALUATED, lambda subject: subject.step),
        *(
            row(f"{name}: {figure.replace('_', ' ')}", on_text(name, figure))
            for name in texts
            for figure in _TEXT_FIGURES
        ),
        *(row(f"{task}: {metric}", in_task(task, metric)) for task, metric in _task_metrics(subjects)),
    ]
    return [(label, values) for label, values in found if any(value is not None for value in values)]


def _losses(subject: Subject) -> list[float]:
    return [row["validation_loss"] for row in subject.files.metrics if row.get("validation_loss") is not None]


def _task_metrics(subjects: Sequence[Subject]) -> list[tuple[str, str]]:
    pairs = [(task, metric) for one in subjects for task, found in one.tasks.items() for metric in found["metrics"]]
    return sorted(dict.fromkeys(pairs))


def _task_value(subject: Subject, task: str, metric: str) -> float | None:
    found = subject.tasks.get(task, {}).get("metrics", {}).get(metric)
    return None if found is None else float(found["value"])


def config_differences(subjects: Sequence[Subject]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all runs, as (dotted key, value in each run)."""
    flat = [dict(_flat(subject.files.config)) for subject in subjects]
    keys = sorted({key for one in flat for key in one} - _NOT_COMPARED)
    rows = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def curve(subject: Subject, axis: str, figure: str) -> list[tuple[float, float]]:
    """The points of a figure over an axis; none where the run did not write it down."""
    rows = subject.files.metrics
    return [(row[axis], row[figure]) for row in rows if row.get(axis) is not None and row.get(figure) is not None]


def reached(subjects: Sequence[Subject]) -> tuple[float, list[Reached]] | None:
    """The lowest validation loss that all runs came down to, and when each did; None where a run has none.

    Between two evaluations the loss is taken to fall in a straight line.
    """
    lows = [min(_losses(subject), default=None) for subject in subjects]
    if any(low is None for low in lows):
        return None
    target = max(low for low in lows if low is not None)
    rows = [
        Reached(one.name, {axis: _first(curve(one, axis, "validation_loss"), target) for axis in AXES})
        for one in subjects
    ]
    return target, rows


def _first(points: Sequence[tuple[float, float]], target: float) -> float | None:
    before: tuple[float, float] | None = None
    for x, loss in points:
        if loss <= target:
            if before is None or before[1] == loss:
                return x
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (x, loss)
    return None


def judgements(subjects: Sequence[Subject]) -> list[Judgement]:
    """How every other run differs from the first in the evaluations that both have."""
    first, *others = subjects
    found: list[Judgement] = []
    for other in others:
        for name in first.evaluations:
            if name in other.evaluations:
                found += _on_text(name, first.evaluations[name], other.evaluations[name], other.name)
        for task, metric in _task_metrics([first]):
            if _task_value(other, task, metric) is not None:
                found.append(_on_task(task, metric, first, other))
    return found


def _on_text(name: str, first: Mapping[str, Any], second: Mapping[str, Any], other: str) -> Iterator[Judgement]:
    for figure, columns in _TEXT_FIGURES.items():
        before, after = first.get(figure), second.get(figure)
        if before is None or after is None:
            continue
        what = f"{name}: {figure.replace('_', ' ')}"
        if "blocks" not in first or "blocks" not in second:
            yield Judgement(what, other, before, after, None, "evaluated by an earlier version; evaluate again")
            continue
        sums = [np.array([one["blocks"][column] for column in BLOCKS]).T for one in (first, second)]
        weights = BLOCKS.index(columns[1])
        # The very first token is not scored, so with another tokenizer the first block has other bytes.
        if len(sums[0]) != len(sums[1]) or not np.array_equal(sums[0][1:, weights], sums[1][1:, weights]):
            yield Judgement(
                what, other, before, after, None, "not the same " + ("tokens" if figure == "loss" else "text")
            )
            continue
        scale = 1.0 if figure == "loss" else 1 / np.log(2)
        pairs = [one[:, [BLOCKS.index(column) for column in columns]] * [scale, 1.0] for one in sums]
        yield Judgement(what, other, before, after, ratio_difference(*pairs))


def _on_task(task: str, metric: str, first: Subject, second: Subject) -> Judgement:
    before, after = _task_value(first, task, metric), _task_value(second, task, metric)
    assert before is not None and after is not None
    members = [name for name, one in first.tasks.items() if one["group"] == task] or [task]
    ones = [(first.tasks[name], second.tasks.get(name, {})) for name in members]
    judgement = Judgement(f"{task}: {metric}", second.name, before, after, None)
    if any(one["fingerprint"] != other.get("fingerprint") for one, other in ones):
        return judgement._replace(reason="not the same questions")
    pairs = [tuple(each.get("outcomes", {}).get(metric) for each in both) for both in ones]
    if any(values is None for both in pairs for values in both):
        return judgement._replace(reason="no outcomes of single questions")
    rows = [tuple(np.stack([values, np.ones(len(values))], axis=1) for values in both) for both in pairs]
    difference = mean_ratio_difference(rows)  # type: ignore[arg-type]
    if not np.isclose(difference.value, after - before, atol=1e-6):
        return judgement._replace(reason="not a mean over questions")
    return judgement._replace(difference=difference)
