"""The picture of a ladder: its runs, the law through them, and the parabolas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config.files import atomic_write
from training.console import count
from training.isoflop import Parabola
from training.power_law import Law, Point


def plot_ladder(
    points: Sequence[Point], law: Law, parabolas: Sequence[Parabola], path: Path, measured: Point | None = None
) -> None:
    """Draw loss by tokens for every size, and by size with the IsoFLOP parabolas, into the PNG `path`.

    `measured` is the run that was predicted: it was not fitted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    sizes = sorted({point.parameters for point in points})
    most = max(point.tokens for point in [*points, *([measured] if measured else [])])
    least = min(point.tokens for point in points)
    tokens = np.geomspace(least / 1.5, most * 1.5, 100)
    for number, size in enumerate(sizes):
        of_size = sorted((point.tokens, point.loss) for point in points if point.parameters == size)
        colour = f"C{number % 10}"
        left.plot(*zip(*of_size), "o", color=colour, label=f"{count(size)} parameters")
        left.plot(tokens, [law.loss(size, each) for each in tokens], color=colour, linewidth=1, alpha=0.7)
    if measured is not None:
        left.plot(
            [measured.tokens], [measured.loss], "k*", markersize=12, label=f"{count(measured.parameters)}, not fitted"
        )
        curve = [law.loss(measured.parameters, each) for each in tokens]
        left.plot(tokens, curve, "k--", linewidth=1)
    left.set_xscale("log")
    left.set_xlabel("tokens")
    left.set_ylabel("validation loss (nats per token)")
    left.legend(frameon=False)

    shown = right.scatter(
        [point.parameters for point in points],
        [point.loss for point in points],
        c=np.log10([point.flops for point in points]),
    )
    figure.colorbar(shown, ax=right, label="log10 of floating-point operations")
    across = np.geomspace(sizes[0], sizes[-1], 100)
    for parabola in parabolas:
        right.plot(across, np.polyval(parabola.curve, np.log(across)), linewidth=1, color="#636363")
        right.plot([parabola.parameters], [parabola.loss], "x", color="#e6550d")
        if parabola.parameters_interval is not None:
            right.plot(parabola.parameters_interval, [parabola.loss] * 2, color="#e6550d", linewidth=2, alpha=0.6)
    right.set_xscale("log")
    right.set_xlabel("parameters")
    losses = [point.loss for point in points]
    margin = 0.1 * (max(losses) - min(losses)) + 0.02
    left.set_ylim(min([*losses, *([measured.loss] if measured else [])]) - margin, max(losses) + margin)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
