"""The best size for each budget of compute: IsoFLOP parabolas, approach 2 of Hoffmann et al., 2022.

https://arxiv.org/abs/2203.15556
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.power_law import Point

RESAMPLES = 1000
UNDETERMINED = 0.05  # share of the resamples that may have no lowest point

Interval = tuple[float, float]


class Parabola(NamedTuple):
    """The least of losses of about the same FLOPs, as a parabola of log N has it; its curve is (c2, c1, c0).

    The 95 % intervals are None where the runs do not tell.
    """

    flops: float
    parameters: float
    loss: float
    curve: tuple[float, float, float]
    parameters_interval: Interval | None = None
    loss_interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class IsoFlop:
    """The parabolas, and a in: the best number of parameters grows as FLOPs**a; None for fewer than two parabolas."""

    parabolas: Sequence[Parabola]
    exponent: float | None
    exponent_interval: Interval | None


def fit_isoflop(points: Sequence[Point], within: float = 0.15, seed: int = 0, resamples: int = RESAMPLES) -> IsoFlop:
    """A parabola through every group of three runs or more of about the same FLOPs, where its least is among them.

    FLOPs that differ by less than `within` of themselves are about the same. The intervals come from a bootstrap of
    the residuals of all groups together, made larger by what three fitted numbers take from them; groups of just three
    have none, so with only such there is no interval.
    """
    groups = []
    for group in _groups(points, within):
        sizes, losses = np.log([point.parameters for point in group]), np.array([point.loss for point in group])
        if len(set(sizes)) < 3:
            continue
        curve = np.polyfit(sizes, losses, 2)
        lowest = _lowest(curve)
        if lowest is not None and sizes.min() <= lowest[0] <= sizes.max():
            flops = float(np.exp(np.mean(np.log([point.flops for point in group]))))
            groups.append((sizes, losses, curve, flops, lowest))
    parabolas = [
        Parabola(flops, math.exp(size), loss, (float(curve[0]), float(curve[1]), float(curve[2])))
        for _, _, curve, flops, (size, loss) in groups
    ]
    exponent = _exponent([each[3] for each in groups], np.array([each[4][0] for each in groups]))
    residuals = np.concatenate(
        [
            (losses - np.polyval(curve, sizes)) * math.sqrt(len(sizes) / (len(sizes) - 3))
            for sizes, losses, curve, *_ in groups
            if len(sizes) > 3
        ]
        or [np.empty(0)]
    )
    if not len(residuals):
        return IsoFlop(parabolas, exponent, None)
    generator = np.random.default_rng(seed)
    found = np.full((resamples, len(groups), 2), math.nan)
    for draw in found:
        for place, (sizes, _, curve, *_) in enumerate(groups):
            again = np.polyval(curve, sizes) + generator.choice(residuals, len(sizes))
            draw[place] = _lowest(np.polyfit(sizes, again, 2)) or (math.nan, math.nan)
    exponents = [_exponent([each[3] for each in groups], sizes) for sizes in found[:, :, 0]]
    for place, parabola in enumerate(parabolas):
        size, loss = _interval(found[:, place, 0]), _interval(found[:, place, 1])
        parabolas[place] = parabola._replace(
            parameters_interval=size and (math.exp(size[0]), math.exp(size[1])), loss_interval=loss
        )
    return IsoFlop(parabolas, exponent, None if exponent is None else _interval(np.array(exponents, dtype=float)))


def _groups(points: Sequence[Point], within: float) -> list[list[Point]]:
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if groups and point.flops <= groups[-1][0].flops * (1 + within):
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _lowest(curve: NDArray[Any]) -> tuple[float, float] | None:
    """Where a parabola is lowest, and its value there; None for one that is open below, or too flat to have one."""
    c2, c1, c0 = map(float, curve)
    if c2 <= 0 or abs(c1) > 200 * c2:
        return None
    return -c1 / (2 * c2), c0 - c1**2 / (4 * c2)


def _exponent(flops: Sequence[float], sizes: NDArray[Any]) -> float | None:
    if len(flops) < 2:
        return None
    return float(np.polyfit(np.log(flops), sizes, 1)[0]) if np.isfinite(sizes).all() else math.nan


def _interval(values: NDArray[Any]) -> Interval | None:
    """95 % of the finite `values` lie between; None where too many are none."""
    finite = values[np.isfinite(values)]
    if len(finite) < (1 - UNDETERMINED) * len(values):
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
