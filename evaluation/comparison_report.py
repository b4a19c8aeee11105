"""A comparison of runs as tables in the terminal, and as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.command import table_console
from config.files import write_text
from config.pages import render
from evaluation.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, line_chart, short
from evaluation.compare import (
    AXES,
    EVALUATED,
    Judgement,
    config_differences,
    curve,
    figures,
    judgements,
    reached,
)
from evaluation.subjects import Subject

_CURVES = {
    "validation_loss": "validation loss",
    "loss": "training loss",
    "task_accuracy": "accuracy in the questions asked in training",
}


def print_comparison(subjects: Sequence[Subject]) -> None:
    """Figures, settings that differ, and judged differences, as tables on standard output."""
    names = [subject.name for subject in subjects]
    _print_table(["", *names], [[label, *_numbers(label, values)] for label, values in figures(subjects)])
    if found := reached(subjects):
        target, rows = found
        print(f"When the validation loss was down to {target:.4f}:")
        values = [[label, *_numbers(label, [row.at[axis] for row in rows])] for axis, label in AXES.items()]
        _print_table(["", *names], values)
    if differences := config_differences(subjects):
        print("Settings that differ:")
        _print_table(["setting", *names], [[key, *map(str, values)] for key, values in differences])
    judged = judgements(subjects)
    if judged:
        print(f"Differences from {names[0]}, on the same text and the same questions:")
        head = ["figure", "run", "difference", "95 % interval", "p"]
        _print_table(head, [[one.what, one.other, *_judged(one)] for one in judged])
    else:
        print("No evaluation is common to the runs. Evaluate each with python scripts/eval.py and --tasks quern.")


def write_page(subjects: Sequence[Subject], path: Path) -> None:
    """The comparison as a page at `path`."""
    found = reached(subjects)
    page = render(
        Path(__file__).parent / "templates" / "comparison.html",
        names=[subject.name for subject in subjects],
        figures=[(label, _numbers(label, values)) for label, values in figures(subjects)],
        target=f"{found[0]:.4f}" if found else None,
        reached=[(label, _numbers(label, [row.at[axis] for row in found[1]])) for axis, label in AXES.items() if found],
        charts=[(axis, label, _charts(subjects, axis)) for axis, label in AXES.items() if _charts(subjects, axis)],
        differences=config_differences(subjects),
        judgements=[(one.what, one.other, _sure(one), *_judged(one)) for one in judgements(subjects)],
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP},
    )
    write_text(path, page)


def _charts(subjects: Sequence[Subject], axis: str) -> list[Chart]:
    charts = []
    for figure, label in _CURVES.items():
        chart = line_chart(label, [(subject.name, curve(subject, axis, figure)) for subject in subjects])
        if chart is not None:
            charts.append(chart)
    return charts


def _judged(one: Judgement) -> list[str]:
    """Difference, interval and p-value as text; where it was not judged, why."""
    plain = f"{one.after - one.before:+.4f}"
    if one.difference is None:
        return [plain, one.reason, ""]
    interval, p_value = one.difference.interval, one.difference.p_value
    if interval is None or p_value is None:
        return [plain, "too few to tell", ""]
    return [plain, f"{interval[0]:+.4f} to {interval[1]:+.4f}", "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"]


def _sure(one: Judgement) -> bool:
    """Whether the interval leaves zero out."""
    return one.difference is not None and one.difference.p_value is not None and one.difference.p_value < 0.05


def _numbers(label: str, values: Sequence[float | None]) -> list[str]:
    """What `label` says as text: costs in few digits, and what was reached in four decimals."""

    def text(value: float | None) -> str:
        if value is None:
            return ""
        if label in (EVALUATED, *AXES.values()):
            return f"{value:,.0f}" if value < 10**6 else short(value)
        return f"{value:.4f}"

    return [text(value) for value in values]


def _print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table

    table = Table()
    for place, column in enumerate(head):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    table_console().print(table)
