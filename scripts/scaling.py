"""Command: the law of loss over size and data, from a ladder of small runs, and what it predicts of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run, table_console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from training.isoflop import IsoFlop
    from training.ladder import Ladder
    from training.power_law import Fit, Point

File = Annotated[
    Path, typer.Argument(metavar="LADDER.yaml", help="Sizes and budgets of tokens or FLOPs.", show_default=False)
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Train the run that is predicted, too, and say how it came out.")
]


def scaling(
    ladder: File,
    overrides: Overrides = None,
    measure: Measure = False,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Train a ladder of sizes and budgets of tokens or FLOPs, and fit how the loss falls with both.

    Every run is an ordinary one in runs/, trained once: type the command again after an
    interruption, or with more sizes or budgets in the file. --config lies under the
    settings of the file, in the place of its base; SECTION.KEY=VALUE over them.
    """
    if print_config:
        resolve(recipe, overrides, print_config)
    from training.isoflop import fit_isoflop
    from training.ladder import measured, read_ladder, train_all, write_results
    from training.ladder_plots import plot_ladder
    from training.power_law import fit_law

    plan = read_ladder(ladder, overrides or [], recipe)
    train_all(plan.runs, print)
    points = {each.name: measured(each) for each in plan.runs}
    fit, isoflop = fit_law(list(points.values())), fit_isoflop(list(points.values()))
    _show(points, fit, isoflop)
    outcome = None
    if plan.predicted is not None:
        _predict(plan, fit)
        if measure:
            train_all([plan.predicted], print)
        if plan.predicted.result is not None:
            outcome = measured(plan.predicted)
            off = fit.law.loss(outcome.parameters, outcome.tokens) - outcome.loss
            print(
                f"It came to {outcome.loss:.4f}: the prediction is {abs(off):.4f} too {'high' if off > 0 else 'low'}."
            )
    write_results(plan, points, fit, isoflop)
    plot_ladder(list(points.values()), fit.law, isoflop.parabolas, plan.directory / "scaling.png", outcome)
    print(f"Written to {plan.directory}/: scaling.json, scaling.png.")


def _show(points: Mapping[str, Point], fit: Fit, isoflop: IsoFlop) -> None:
    from operator import attrgetter

    from rich.table import Table

    from training.console import count

    table = Table("run", "parameters", "tokens", "FLOPs", "loss", "the law's", title="The ladder")
    for name, point in points.items():
        law = fit.law.loss(point.parameters, point.tokens)
        figures = [count(point.parameters), count(point.tokens), f"{point.flops:.2g}"]
        table.add_row(name, *figures, f"{point.loss:.4f}", f"{law:.4f}")
    table_console().print(table)
    named = {
        "E, what no size and no data take away": "irreducible",
        "A": "parameter_factor",
        "alpha, exponent of parameters": "parameter_exponent",
        "B": "token_factor",
        "beta, exponent of tokens": "token_exponent",
        "best parameters grow as FLOPs to the": "optimal_exponent",
    }
    table = Table("L(N, D) = E + A / N^alpha + B / D^beta", "fit", "95 % interval")
    for label, key in named.items():
        low, high = fit.interval(attrgetter(key))
        table.add_row(label, f"{getattr(fit.law, key):.4g}", f"{low:.4g} to {high:.4g}")
    table_console().print(table)
    print(f"Root mean square of the relative error: {fit.error:.2%}.")
    for each in isoflop.parabolas:
        between = each.parameters_interval
        likely = f" (95 % interval {count(between[0])} to {count(between[1])})" if between else " (interval unknown)"
        print(
            f"At {each.flops:.2g} FLOPs the parabola is lowest at {count(each.parameters)} parameters{likely}: "
            f"{each.loss:.4f}."
        )
    if isoflop.exponent is not None:
        low_high = isoflop.exponent_interval
        likely = f"95 % interval {low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else "interval unknown"
        print(f"By the parabolas, the best parameters grow as FLOPs to the {isoflop.exponent:.2f} ({likely}).")


def _predict(plan: Ladder, fit: Fit) -> None:
    from training.console import count
    from training.ladder import size_and_tokens

    assert plan.predicted is not None
    parameters, tokens = size_and_tokens(plan)
    low, high = fit.prediction(parameters, tokens)
    print(
        f"{plan.predicted.name}, {count(parameters)} parameters and {count(tokens)} tokens: predicted loss "
        f"{fit.law.loss(parameters, tokens):.4f}, 95 % interval {low:.4f} to {high:.4f}."
    )


def main() -> None:
    """Run the command."""
    run(scaling)


if __name__ == "__main__":
    main()
