"""Confidence intervals of a ratio of sums, such as loss per token, by resampling whole blocks of text."""

import numpy as np

FEWEST_BLOCKS = 8
_MOST_BLOCKS = 1000
_RESAMPLES = 2000


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
