"""How loss falls with size and data: the law fitted to runs, with intervals, and what it predicts of a larger run.

L(N, D) = E + A / N**alpha + B / D**beta, for N parameters and D tokens: approach 3 of Hoffmann et al., 2022
(https://arxiv.org/abs/2203.15556).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from config.errors import UserError

FITTED = 5  # numbers that the law has
FEWEST = FITTED + 1  # runs
DELTA = 1e-3  # where Huber's loss of log-losses turns from squares to absolute values, as in the paper
RESAMPLES = 100
# Where the fits start: the paper's grid, thinned; a and b are log A and log B, e is log E.
GRID = tuple(product((0.0, 10.0, 20.0), (0.0, 10.0, 20.0), (-1.0, 0.5), (0.1, 0.5, 1.0), (0.1, 0.5, 1.0)))


class Point(NamedTuple):
    """A finished run: parameters, tokens, floating-point operations, and its loss in nats per token."""

    parameters: float
    tokens: float
    flops: float
    loss: float


@dataclass(frozen=True, slots=True)
class Law:
    """The five numbers of L(N, D)."""

    irreducible: float
    parameter_factor: float
    parameter_exponent: float
    token_factor: float
    token_exponent: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token that a model of so many parameters reaches after so many tokens."""
        by_size = self.parameter_factor / parameters**self.parameter_exponent
        by_tokens = self.token_factor / tokens**self.token_exponent
        return float(self.irreducible + by_size + by_tokens)

    @property
    def optimal_exponent(self) -> float:
        """a in: the best number of parameters grows as FLOPs**a (the paper's equation 4)."""
        return self.token_exponent / (self.parameter_exponent + self.token_exponent)


@dataclass(frozen=True, slots=True)
class Fit:
    """The law of the runs, those of resampled runs, and by how much the logarithm of each loss is above the law's."""

    law: Law
    resampled: Sequence[Law]
    residuals: Sequence[float]

    @property
    def error(self) -> float:
        """The root mean square of the relative errors."""
        return math.sqrt(float(np.mean(np.square(np.expm1(np.negative(self.residuals))))))

    def interval(self, figure: Any) -> tuple[float, float]:
        """Of what the function `figure` makes of a law: 95 % of the resampled laws lie between."""
        low, high = np.quantile([figure(law) for law in self.resampled], [0.025, 0.975])
        return float(low), float(high)

    def prediction(self, parameters: float, tokens: float) -> tuple[float, float]:
        """Where 95 % of runs of that size on that data come to: the law is uncertain, and runs lie about it.

        Every resampled law with every residual, made larger by what five fitted numbers take from them.
        """
        scale = math.sqrt(len(self.residuals) / (len(self.residuals) - FITTED))
        laws = np.array([law.loss(parameters, tokens) for law in self.resampled])
        low, high = np.quantile(np.outer(laws, np.exp(scale * np.array(self.residuals))), [0.025, 0.975])
        return float(low), float(high)


def fit_law(points: Sequence[Point], seed: int = 0, resamples: int = RESAMPLES) -> Fit:
    """Fit the law: least Huber loss of log-losses, by L-BFGS from a grid of starts; the best of them counts.

    The intervals come from runs drawn anew with repetition, each fit of which starts where the first one ended.
    Raises `UserError` for fewer than 6 runs, or where all have one size or one number of tokens.
    """
    if len(points) < FEWEST:
        raise UserError(f"The law has five numbers, so it takes {FEWEST} finished runs or more, not {len(points)}.")
    table = np.array([(p.parameters, p.tokens, p.loss) for p in points])
    for column, what in enumerate(("size", "number of tokens")):
        if len(set(table[:, column])) < 2:
            raise UserError(f"All runs have the same {what}, so how the loss depends on it cannot be told.")
    logs = np.log(table)
    best = min((_minimise(logs, np.array(start)) for start in GRID), key=lambda found: found[1])[0]
    generator = np.random.default_rng(seed)
    resampled: list[Law] = []
    while len(resampled) < resamples:
        drawn = logs[generator.integers(0, len(logs), len(logs))]
        if all(len(set(drawn[:, column])) > 1 for column in (0, 1)):
            resampled.append(_law(_minimise(drawn, best)[0]))
    law = _law(best)
    return Fit(law, resampled, [math.log(p.loss / law.loss(p.parameters, p.tokens)) for p in points])


def _law(solution: NDArray[Any]) -> Law:
    a, b, e, alpha, beta = map(float, solution)
    return Law(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


def _minimise(logs: NDArray[Any], start: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """The solution (a, b, e, alpha, beta) found from `start`, and its loss; `logs` (runs, 3) of sizes, tokens, losses.

    Exponents and logarithms stay within what any law of text has had, so that no power overflows.
    """
    from scipy.optimize import minimize

    bounds = [(-5, 60), (-5, 60), (-8, 4), (0.01, 3), (0.01, 3)]
    found = minimize(_huber, start, args=(logs,), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000})
    return found.x, float(found.fun)


def _huber(solution: NDArray[Any], logs: NDArray[Any]) -> tuple[float, NDArray[Any]]:
    """Huber's loss of the log-losses, and its gradient."""
    a, b, e, alpha, beta = solution
    terms = np.stack([a - alpha * logs[:, 0], b - beta * logs[:, 1], np.full(len(logs), e)])
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    residual = top + np.log(total) - logs[:, 2]
    inside = np.abs(residual) <= DELTA
    loss = np.where(inside, residual**2 / 2, DELTA * (np.abs(residual) - DELTA / 2)).sum()
    pull = np.where(inside, residual, DELTA * np.sign(residual)) * shares / total
    by_term = pull.sum(axis=1)
    by_exponent = -(pull[0] * logs[:, 0]).sum(), -(pull[1] * logs[:, 1]).sum()
    scale = 1 / DELTA  # so that the optimiser's tolerances, which are absolute, are tight
    return float(loss * scale), np.array([*by_term, *by_exponent]) * scale
