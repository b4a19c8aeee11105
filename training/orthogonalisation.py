"""Matrices made orthogonal by products of matrices alone: what Muon does to its momentum, for stacks of one shape.

A step is an odd quintic, a X + b (X X') X + c (X X')^2 X, which leaves the singular vectors of X as they are and moves
its singular values towards 1. Two families are known here:

- `newton_schulz`: Jordan's (2024, https://kellerjordan.github.io/posts/muon/), one quintic again and again. It is steep
  at zero and never settles: after five steps the values lie within about [0.7, 1.2].
- `polar_express`: Amsel et al., 2025 (https://arxiv.org/abs/2505.16932). Each step has the quintic whose largest error
  is the least possible over the interval that the steps before it left, so it settles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Method = Literal["newton_schulz", "polar_express"]
Quintic = tuple[float, float, float]

JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
CUSHION = 0.02407327424182761  # of Amsel et al.: no quintic is fitted to an interval longer than 1 / CUSHION
SAFETY = 1.01  # of Amsel et al.: rounding may lift a singular value over the interval by so much
FEWEST = 1e-3  # the smallest singular value that Amsel et al. fit, where there are steps enough to bring it to 1


@dataclass(frozen=True)
class Iteration:
    """The quintics, one for each step, and by what a matrix is divided to begin with.

    `frobenius` is its norm. `schatten` is the fourth root of the sum of the fourth powers of its singular values, which
    is no smaller than the largest either and several times nearer to it where many are alike; it costs nothing, being
    the square root of the norm of X X', which the first step needs anyway (Grishina et al., 2025,
    https://arxiv.org/abs/2506.10935, section 4).
    """

    quintics: tuple[Quintic, ...]
    norm: Literal["frobenius", "schatten"]


@cache
def iteration(method: Method, steps: int) -> Iteration:
    """The iteration of `steps` steps of `method`.

    With fewer than five, Polar Express cannot bring a value of 0.001 to 1, and trying would keep the large ones from
    it: the fewer steps, the larger the smallest value that they are fitted to.
    """
    if method == "newton_schulz":
        return Iteration((JORDAN,) * steps, "frobenius")
    return Iteration(polar_express(steps, max(FEWEST, 10.0 ** (-(steps + 1) / 2))), "schatten")


def polar_express(steps: int, smallest: float) -> tuple[Quintic, ...]:
    """The quintics of Polar Express for singular values in [`smallest`, 1], as Amsel et al., section 3 and appendix G.

    For (8, 0.001) these are the numbers that they print. All but the last are stretched by `SAFETY`.
    """
    lower, upper = smallest, 1.0
    found: list[Quintic] = []
    for _ in range(steps):
        quintic = best_quintic(max(lower, CUSHION * upper), upper)
        # The cushion leaves out the smallest values: centre the interval around 1 again.
        scale = 2.0 / (_value(quintic, lower) + _value(quintic, upper)) if lower < CUSHION * upper else 1.0
        quintic = (quintic[0] * scale, quintic[1] * scale, quintic[2] * scale)
        found.append(quintic)
        lower = _value(quintic, lower)
        upper = 2.0 - lower
    return (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in found[:-1]), found[-1])


def best_quintic(lower: float, upper: float) -> Quintic:
    """The a, b, c with the least max |a x + b x^3 + c x^5 - 1| over [`lower`, `upper`], by Remez' exchange.

    At the best one the error swings between -e and e at the two ends and at the two turning points between them.
    """
    if lower > (1.0 - 1e-5) * upper:  # Newton-Schulz itself, to which it tends as the interval shrinks
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    turning = [(3 * lower + upper) / 4, (lower + 3 * upper) / 4]
    error = math.inf
    for _ in range(100):
        points = torch.tensor([lower, *turning, upper], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, swing = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        if abs(swing - error) < 1e-15:
            break
        error, root = swing, math.sqrt(9 * b * b - 20 * a * c)
        turning = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return a, b, c


def _value(quintic: Quintic, x: float) -> float:
    a, b, c = quintic
    return a * x + b * x**3 + c * x**5


def orthogonalise(matrices: Tensor, how: Iteration, dtype: torch.dtype) -> Tensor:
    """U S' V' with S' near 1 for each U S V' of `matrices` (count, rows, columns): about the nearest orthogonal one.

    Computed in `dtype`, and returned in it as (count, rows, columns). Each matrix by itself: nothing depends on what
    else is in the stack.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    matrices = matrices.mT if tall else matrices
    scale = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp(min=1e-20)
    x = (matrices / scale).to(dtype)
    gram = x @ x.mT
    if how.norm == "schatten":
        squared = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp(min=1e-20)
        x, gram = (matrices / (scale * squared.sqrt())).to(dtype), gram / squared
    if dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2):
        x = _through_gram(x, gram, how.quintics)
    else:
        x = _directly(x, gram, how.quintics)
    return x.mT if tall else x


def _directly(x: Tensor, gram: Tensor, quintics: tuple[Quintic, ...]) -> Tensor:
    """The steps as they are defined. Every sum is made within a product, so in float32 even for bfloat16."""
    for number, (a, b, c) in enumerate(quintics):
        gram = x @ x.mT if number else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor, gram: Tensor, quintics: tuple[Quintic, ...]) -> Tensor:
    """The same steps taken by the small G = X X' alone, and applied to the wide X once; `x` is (count, m, n), m < n.

    With P = a I + b G + c G^2, X becomes P X and G becomes P^2 G, since P commutes with G. So a step costs four
    products of (m, m) in place of one and two of (m, n). It squares the singular values, so it needs float32.
    """
    whole = None
    for number, (a, b, c) in enumerate(quintics, start=1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor if whole is None else factor @ whole
        if number < len(quintics):
            gram = factor @ (factor @ gram)
    assert whole is not None
    return whole @ x
