"""The law of loss, size and data: planted exponents are found again."""

from __future__ import annotations

import numpy as np
import pytest

from config.errors import UserError
from training.isoflop import fit_isoflop
from training.power_law import Law, Point, fit_law

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
    isoflop = fit_isoflop(planted(CHINCHILLA, noise=0.0005))
    found = isoflop.parabolas
    assert len(found) >= 4
    ratio = alpha * CHINCHILLA.parameter_factor / (beta * CHINCHILLA.token_factor)
    for each in found:
        best = ratio ** (1 / (alpha + beta)) * (each.flops / 6) ** (beta / (alpha + beta))
        assert each.parameters == pytest.approx(best, rel=0.25)
        low_high = each.parameters_interval
        assert low_high is not None and low_high[0] < each.parameters < low_high[1] < 1.5 * low_high[0]
        assert each.loss_interval is not None and each.loss_interval[0] < each.loss < each.loss_interval[1]
    assert isoflop.exponent == pytest.approx(beta / (alpha + beta), abs=0.05)
    assert isoflop.exponent is not None and isoflop.exponent_interval is not None
    assert isoflop.exponent_interval[0] < isoflop.exponent < isoflop.exponent_interval[1]


def test_intervals_of_parabolas_grow_with_the_noise_and_are_not_made_up() -> None:
    quiet, loud = (fit_isoflop(planted(CHINCHILLA, noise)).exponent_interval for noise in (0.0, 0.006))
    assert quiet is not None and loud is not None and loud[1] - loud[0] > 2 * (quiet[1] - quiet[0])
    three = [point for point in planted(CHINCHILLA) if point.parameters in SIZES[[1, 3, 5]]]
    alone = fit_isoflop([point for point in three if point.flops < 2e19])
    assert len(alone.parabolas) == 1 and alone.parabolas[0].parameters_interval is None
    assert alone.exponent is None and alone.exponent_interval is None


def test_a_prediction_is_as_uncertain_as_single_runs_are() -> None:
    """Of runs one per cent about the law, 95 % lie within two: far more than the law itself is uncertain by."""
    fit = fit_law(planted(CHINCHILLA, noise=0.01), resamples=40)
    at = 1e9, 2e10
    low, high = fit.interval(lambda law: law.loss(*at))
    least, most = fit.prediction(*at)
    assert least < low < high < most and 0.03 < (most - least) / CHINCHILLA.loss(*at) < 0.06
    generator = np.random.default_rng(2)
    outcomes = CHINCHILLA.loss(*at) * (1 + 0.01 * generator.normal(size=1000))
    assert 0.9 < np.mean((outcomes > least) & (outcomes < most)) < 0.99


def test_too_few_runs_or_runs_all_alike_are_refused() -> None:
    points = planted(CHINCHILLA)
    with pytest.raises(UserError, match="6 finished runs or more, not 5"):
        fit_law(points[:5])
    with pytest.raises(UserError, match="All runs have the same size"):
        fit_law([point._replace(parameters=1e8) for point in points])
