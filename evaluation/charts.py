"""Line charts as SVG that a page holds: coordinates and ticks; how they look is the page's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 880, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
_SETTLED = 0.1  # what a curve does in the first tenth of its points is drawn as far as the rest leaves room

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: `path` is the SVG polyline, `points` are (x, y, text) of the marks of a short one."""

    name: str
    path: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves in one frame; ticks are (position, text)."""

    label: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


def line_chart(label: str, curves: Sequence[tuple[str, Points]], marks: int = 60) -> Chart | None:
    """The chart of `curves`, each a name and its points; None where there is not a line to draw.

    A curve of at most `marks` points has each of them marked.
    """
    if not any(len(points) > 1 for _, points in curves):
        return None
    settled = [y for _, points in curves for _, y in points[int(_SETTLED * len(points)) :]]
    low, high = min(settled), max(settled)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    end = max(x for _, points in curves for x, _ in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / end
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)
        return round(across, 1), round(max(down, -HEIGHT), 1)

    lines = []
    for name, points in curves:
        placed = [place(*point) for point in points]
        texts = [f"{name}: {y:.4f} at {short(x)}" for x, y in points]
        shown = (
            [(*where, text) for where, text in zip(placed, texts) if where[1] >= TOP] if len(points) <= marks else []
        )
        lines.append(Line(name, " ".join(f"{x},{y}" for x, y in placed), shown))
    return Chart(
        label=label,
        lines=lines,
        x_ticks=[(place(tick, low)[0], short(tick)) for tick in ticks(0.0, end)],
        y_ticks=[(place(0.0, tick)[1], f"{tick:g}") for tick in ticks(low, high)],
    )


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, near `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters: 950, 12K, 3.4M, 2.1e+15."""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
