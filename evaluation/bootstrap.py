"""Confidence intervals of a ratio of sums, such as loss per token, and of differences, by resampling whole blocks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST_BLOCKS = 8
_MOST_BLOCKS = 1000
_RESAMPLES = 2000
_PAIRED_RESAMPLES, _AT_ONCE = 10_000, 1000


class Difference(NamedTuple):
    """By how much one figure differs from another on the same blocks, and how surely; None where blocks are few.

    `p_value` is two-sided: how often a difference of either sign would come about by the choice of blocks alone.
    """

    value: float
    interval: tuple[float, float] | None
    p_value: float | None


def ratio_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Paired bootstrap of the ratio of `second` less that of `first`, each `(blocks, 2)`: numerators, denominators.

    The same blocks are drawn for both (Koehn 2004), so what makes a block hard for both cancels out.
    """
    return mean_ratio_difference([(first, second)])


def mean_ratio_difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Difference:
    """The mean over `pairs` of such differences; the blocks of each pair are drawn apart from those of the others."""
    observed, resampled, enough = 0.0, np.zeros(_PAIRED_RESAMPLES), True
    for number, (first, second) in enumerate(pairs):
        sums = np.concatenate([first, second], axis=1)
        sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
        enough = enough and len(sums) >= FEWEST_BLOCKS
        observed += float(_difference_of_ratios(sums.sum(axis=0))) / len(pairs)
        if enough:
            resampled += _difference_of_ratios(_resampled_sums(joined(sums), number)) / len(pairs)
    if not enough:
        return Difference(observed, None, None)
    low, high = np.quantile(resampled, [0.025, 0.975])
    rarer = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p_value = min(1.0, 2 * (rarer + 1) / (len(resampled) + 1))
    return Difference(observed, (float(low), float(high)), p_value)


def _difference_of_ratios(sums: np.ndarray) -> np.ndarray:
    found: np.ndarray = sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]
    return found


def _resampled_sums(sums: np.ndarray, seed: int) -> np.ndarray:
    """Sums over as many blocks as there are, drawn with repetition: `(resamples, columns)`."""
    generator, blocks = np.random.default_rng(seed), len(sums)
    draws = (
        generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=_AT_ONCE)
        for _ in range(0, _PAIRED_RESAMPLES, _AT_ONCE)
    )
    return np.concatenate([drawn @ sums for drawn in draws])


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) of `sum(numerators) / sum(denominators)`.

    Both are float64 of shape `(blocks,)`. Blocks, not tokens, are drawn, because the losses of neighbouring tokens are
    alike. More than a thousand blocks are first joined, neighbour to neighbour. None where fewer than eight blocks hold
    anything: an interval from so few would say little. Deterministic.
    """
    held = denominators > 0
    numerators, denominators = numerators[held], denominators[held]
    if len(denominators) < FEWEST_BLOCKS:
        return None
    numerators, denominators = joined(np.stack([numerators, denominators], axis=1)).T
    blocks = len(denominators)
    drawn = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), size=_RESAMPLES)
    ratios = (drawn @ numerators) / (drawn @ denominators)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def joined(sums: np.ndarray) -> np.ndarray:
    """`sums` `(blocks, ...)` with neighbours added up where there are more than a thousand of them."""
    starts = np.linspace(0, len(sums), min(len(sums), _MOST_BLOCKS), endpoint=False).astype(np.int64)
    found: np.ndarray = np.add.reduceat(sums, starts, axis=0)
    return found
