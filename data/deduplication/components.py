"""Connected components by union-find (Tarjan, 1975), with path halving and the least member as root."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import kernel


@kernel
def find(parents: NDArray[Any], member: np.int64) -> np.int64:
    """The root of `member`'s component."""
    at = np.int64(member)
    while np.int64(parents[at]) != at:
        parents[at] = parents[parents[at]]
        at = np.int64(parents[at])
    return at


@kernel
def join(parents: NDArray[Any], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Unite the components of `left[i]` and `right[i]` for all i.

    `parents` starts as 0 ... n-1, unsigned; a member that is its own parent is the least of its component.
    """
    for at in range(len(left)):
        one, other = find(parents, left[at]), find(parents, right[at])
        if one < other:
            parents[other] = one
        else:
            parents[one] = other
