"""The law of loss, size and data: planted exponents are found again."""

from __future__ import annotations

import numpy as np
import pytest

from config.errors import UserError
from training.power_law import Law, Point, fit_law, isoflop_parabolas, optimal_exponent

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al., 2022, appendix D.3
SIZES = np.geomspace(5e7, 5e9, 7)


def planted(law: Law, noise: float = 0.0) -> list[Point]:
    """Five budgets of FLOPs, seven sizes for each, the losses of which are the law's up to `noise` of themselves."""
    generator = np.random.default_rng(1)
    points = []
    for flops in np.geomspace(1e19, 1e21, 5):
        for size in SIZES:
            tokens = flops / (6 * size)
            points.append(Point(size, tokens, flops, law.loss(size, tokens) * (1 + noise * generator.normal())))
    return points


def test_planted_exponents_are_recovered() -> None:
    fit = fit_law(planted(CHINCHILLA), resamples=4)
    for key in ("irreducible", "parameter_exponent", "token_exponent"):
        assert getattr(fit.law, key) == pytest.approx(getattr(CHINCHILLA, key), rel=0.02)
    assert fit.law.loss(7e10, 1.4e12) == pytest.approx(CHINCHILLA.loss(7e10, 1.4e12), rel=2e-3)
    assert fit.law.optimal_exponent == pytest.approx(0.28 / 0.62, rel=0.02) and fit.error < 1e-3


def test_intervals_of_noisy_losses_hold_the_truth_and_one_wild_run_moves_little() -> None:
    points = planted(CHINCHILLA, noise=0.003)
    points[4] = points[4]._replace(loss=points[4].loss * 1.3)
    fit = fit_law(points, resamples=40)
    low, high = fit.interval(lambda law: law.loss(1e10, 2e11))
    assert low < CHINCHILLA.loss(1e10, 2e11) < high and high - low < 0.2
    low, high = fit.interval(lambda law: law.parameter_exponent)
    assert low < 0.34 < high


def test_parabolas_find_the_best_size_of_each_budget() -> None:
    alpha, beta = CHINCHILLA.parameter_exponent, CHINCHILLA.token_exponent
    found = isoflop_parabolas(planted(CHINCHILLA))
    assert len(found) >= 4
    ratio = alpha * CHINCHILLA.parameter_factor / (beta * CHINCHILLA.token_factor)
    for each in found:
        best = ratio ** (1 / (alpha + beta)) * (each.flops / 6) ** (beta / (alpha + beta))
        assert each.parameters == pytest.approx(best, rel=0.25)
    assert optimal_exponent(found) == pytest.approx(beta / (alpha + beta), abs=0.05)
    assert optimal_exponent(found[:1]) is None


def test_too_few_runs_or_runs_all_alike_are_refused() -> None:
    points = planted(CHINCHILLA)
    with pytest.raises(UserError, match="6 finished runs or more, not 5"):
        fit_law(points[:5])
    with pytest.raises(UserError, match="All runs have the same size"):
        fit_law([point._replace(parameters=1e8) for point in points])
