"""What one step of decoding computes on a CPU besides products of matrices, as numba kernels over float32 rows.

Every kernel computes a token's row in the same order whatever else is in the batch and however many threads there are,
so its result depends on neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.compiled import kernel
from inference.products import add_products, added_up, no_products
from inference.vectors import LANES, narrowed, number, numbers, power_of_two, widened

FLOAT32 = np.empty(0, np.float32)
GELU, SQUARED_RELU, SWIGLU = 0, 1, 2


@kernel
def normalise(x: Any, scale: Any, bias: Any, rms: bool, eps: float, out: Any) -> None:
    """LayerNorm of the vector `x`, or with `rms` division by its root mean square; times `scale`, plus `bias`."""
    width, mean, square = len(scale), 0.0, 0.0
    if not rms:
        for i in range(width):
            mean += x[i]
        mean /= width
    for i in range(width):
        square += (x[i] - mean) ** 2
    factor = 1.0 / np.sqrt(square / width + eps)
    for i in range(width):
        out[i] = np.float32((x[i] - mean) * factor) * scale[i] + bias[i]


@kernel
def exponential(x: Any) -> Any:
    """e to the power of a float32 number, to its last digit or two, in a form that compilers turn into vectors.

    The reduction of the argument and the polynomial are those of Cephes (Moshier, 1989).
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    return (y * r * r + r + np.float32(1.0)) * power_of_two(np.int32(n))


@kernel
def activate(hidden: Any, gate: Any, begin: int, end: int, activation: int) -> None:
    """Apply the activation to elements `begin` to `end` of `hidden`, in place; only SwiGLU has a `gate`."""
    one = np.float32(1.0)
    if activation == SQUARED_RELU:
        for i in range(begin, end):
            positive = max(hidden[i], np.float32(0.0))
            hidden[i] = positive * positive
    elif activation == GELU:
        for i in range(begin, end):
            h = hidden[i]
            inner = np.float32(1.5957691216) * (h + np.float32(0.044715) * h * h * h)
            hidden[i] = h / (one + exponential(-inner))
    else:
        for i in range(begin, end):
            hidden[i] *= gate[i] / (one + exponential(-gate[i]))


@kernel
def place(vector: Any, head_dim: int, qk_norm: bool, eps: float, cos: Any, sin: Any) -> None:
    """Normalise a query or key of one head in place, and turn it to its position, if there are tables for that."""
    if qk_norm:
        square = 0.0
        for i in range(head_dim):
            square += vector[i] * vector[i]
        factor = np.float32(1.0 / np.sqrt(square / head_dim + eps))
        for i in range(head_dim):
            vector[i] *= factor
    if cos.size:
        half = head_dim // 2
        for i in range(half):
            a, b = vector[i], vector[i + half]
            vector[i] = a * cos[i] + b * sin[i]
            vector[i + half] = b * cos[i + half] + a * sin[i + half]


@kernel
def keep(vector: Any, cell: Any) -> None:
    """Write a key or value to its cell of the cache, in the cache's type."""
    for i in range(len(cell)):
        cell[i] = narrowed(cell, vector[i])


@kernel
def attend(query: Any, keys: Any, values: Any, begin: int, end: int, scores: Any, out: Any) -> None:
    """Attention of one head's `query` `(head_dim,)` to positions `begin` to `end` of `(positions, head_dim)`."""
    width = len(query)
    vectors, key, other = width // LANES * LANES, keys.ctypes.data, query.ctypes.data
    largest, scale = np.float32(-np.inf), np.float32(1.0 / np.sqrt(width))
    for s in range(begin, end):
        sums, row = no_products(FLOAT32), s * width
        for j in range(0, vectors, LANES):
            sums = add_products(numbers(keys, key, row + j), numbers(FLOAT32, other, j), sums)
        score = added_up(sums)
        for j in range(vectors, width):
            score += number(keys, key, row + j) * query[j]
        score *= scale
        scores[s - begin] = score
        largest = max(largest, score)
    summed = np.float32(0.0)
    for s in range(end - begin):
        scores[s] = exponential(scores[s] - largest)
    for s in range(end - begin):
        summed += scores[s]
    out[:] = np.float32(0.0)
    for s in range(begin, end):
        share_of_it = scores[s - begin] / summed
        for j in range(width):
            out[j] += share_of_it * widened(values[s, j])
