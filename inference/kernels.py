"""What one step of decoding computes on a CPU besides products of matrices, as numba kernels over float32 rows.

Every kernel computes a token's row in the same order whatever else is in the batch and however many threads there are,
so its result depends on neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.compiled import kernel
from inference.products import add_products, added_up, no_products
from inference.vectors import LANES, filled, narrowed, number, numbers, power_of_two, put_numbers

FLOAT32 = np.empty(0, np.float32)
GELU, SQUARED_RELU, SWIGLU = 0, 1, 2


@kernel
def normalise(x: Any, scale: Any, bias: Any, rms: bool, eps: float, out: Any) -> None:
    """LayerNorm of the vector `x`, or with `rms` division by its root mean square; times `scale`, plus `bias`."""
    width, nothing, ones = len(scale), no_products(FLOAT32), filled(np.float32(1.0))
    vectors, source, target = width // LANES * LANES, x.ctypes.data, out.ctypes.data
    scales, biases = scale.ctypes.data, bias.ctypes.data
    mean: Any = np.float32(0.0)
    if not rms:
        sums = nothing
        for j in range(0, vectors, LANES):
            sums = add_products(numbers(FLOAT32, source, j), ones, sums)
        mean = added_up(sums)
        for j in range(vectors, width):
            mean += x[j]
        mean /= np.float32(width)
    less, squares = filled(-mean), nothing
    for j in range(0, vectors, LANES):
        centred = add_products(numbers(FLOAT32, source, j), ones, less)
        squares = add_products(centred, centred, squares)
    square = added_up(squares)
    for j in range(vectors, width):
        square += (x[j] - mean) * (x[j] - mean)
    factor = np.float32(1.0 / np.sqrt(square / np.float32(width) + eps))
    factors = filled(factor)
    for j in range(0, vectors, LANES):
        centred = add_products(numbers(FLOAT32, source, j), ones, less)
        normal = add_products(centred, factors, nothing)
        put_numbers(target, j, add_products(normal, numbers(FLOAT32, scales, j), numbers(FLOAT32, biases, j)))
    for j in range(vectors, width):
        out[j] = (x[j] - mean) * factor * scale[j] + bias[j]


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
    width, seen = len(query), end - begin
    vectors, key, other = width // LANES * LANES, keys.ctypes.data, query.ctypes.data
    largest, scale = np.float32(-np.inf), np.float32(1.0 / np.sqrt(width))
    for s in range(seen):
        sums, row = no_products(FLOAT32), (begin + s) * width
        for j in range(0, vectors, LANES):
            sums = add_products(numbers(keys, key, row + j), numbers(FLOAT32, other, j), sums)
        score = added_up(sums)
        for j in range(vectors, width):
            score += number(keys, key, row + j) * query[j]
        score *= scale
        scores[s] = score
        largest = max(largest, score)
    summed = np.float32(0.0)
    for s in range(seen):
        scores[s] = exponential(scores[s] - largest)
    for s in range(seen):
        summed += scores[s]
    for s in range(seen):
        scores[s] /= summed
    _mix(values, begin * width, seen, width, scores, out)


@kernel
def _mix(values: Any, first: int, seen: int, width: int, shares: Any, out: Any) -> None:
    """The sum of `seen` rows of `width` numbers, from element `first` of `values` on, times their `shares`."""
    start, target, j = values.ctypes.data, out.ctypes.data, 0
    while j + 4 * LANES <= width:
        a, b, c, d = no_products(FLOAT32), no_products(FLOAT32), no_products(FLOAT32), no_products(FLOAT32)
        for s in range(seen):
            part, at = filled(shares[s]), first + s * width + j
            a = add_products(numbers(values, start, at), part, a)
            b = add_products(numbers(values, start, at + LANES), part, b)
            c = add_products(numbers(values, start, at + 2 * LANES), part, c)
            d = add_products(numbers(values, start, at + 3 * LANES), part, d)
        put_numbers(target, j, a)
        put_numbers(target, j + LANES, b)
        put_numbers(target, j + 2 * LANES, c)
        put_numbers(target, j + 3 * LANES, d)
        j += 4 * LANES
    while j + LANES <= width:
        a = no_products(FLOAT32)
        for s in range(seen):
            a = add_products(numbers(values, start, first + s * width + j), filled(shares[s]), a)
        put_numbers(target, j, a)
        j += LANES
    while j < width:
        rest = np.float32(0.0)
        for s in range(seen):
            rest += number(values, start, first + s * width + j) * shares[s]
        out[j] = rest
        j += 1
