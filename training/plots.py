"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.files import atomic_write

Row = dict[str, Any]


def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw losses and learning rate against tokens into the PNG `path`; `rows` are those of `metrics.jsonl`.

    Below the loss axis' ticks, in tokens, stand the steps. The vertical axis leaves out the first steep tenth of the
    run, which would flatten all the rest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120)
    FigureCanvasAgg(figure)
    edges = {"left": 0.09, "right": 0.97, "top": 0.93, "bottom": 0.13, "hspace": 0.08}
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1], gridspec_kw=edges)

    trained = [row for row in rows if row["loss"] is not None]
    tokens, values = [row["tokens"] for row in trained], [row["loss"] for row in trained]
    losses.plot(tokens, values, color="#9ecae1", linewidth=1, label="training")
    losses.plot(tokens, _smooth(values), color="#3182bd", linewidth=1.8, label="training, smoothed")
    evaluated = [row for row in rows if row["validation_loss"] is not None]
    losses.plot(
        [row["tokens"] for row in evaluated],
        [row["validation_loss"] for row in evaluated],
        color="#e6550d",
        linewidth=1.5,
        marker="o",
        markersize=4,
        label="validation",
    )
    if evaluated:
        best = min(evaluated, key=lambda row: float(row["validation_loss"]))
        losses.annotate(
            f"{best['validation_loss']:.3f}",
            (best["tokens"], best["validation_loss"]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            color="#e6550d",
        )
    later = values[len(values) // 10 :] + [row["validation_loss"] for row in evaluated]
    if later:
        margin = 0.06 * (max(later) - min(later)) + 0.02
        losses.set_ylim(min(later) - 2 * margin, max(later) + margin)
    losses.set_ylabel(f"loss (nats per {'pair' if any('reward_margin' in row for row in rows) else 'token'})")
    losses.set_title(title)
    if trained or evaluated:
        losses.legend(frameon=False)

    rates.plot([row["tokens"] for row in rows], [row["learning_rate"] for row in rows], color="#636363")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("tokens")
    rates.set_ylim(bottom=0)
    rates.xaxis.set_major_formatter(_tokens_and_steps(rows))
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the run, centred, narrower at the ends."""
    half = max(1, len(values) // 40)
    return [
        sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1])
        for i in range(len(values))
    ]


def _tokens_and_steps(rows: Sequence[Row]) -> Any:
    """Ticks as `4M` with `step 500` below it."""
    import numpy as np

    from training.console import count

    tokens_of, steps = ([0, *(row[key] for row in rows)] for key in ("tokens", "step"))

    def label(tokens: float, _position: int) -> str:
        return f"{count(max(0, tokens))}\nstep {np.interp(tokens, tokens_of, steps):,.0f}"

    return label
