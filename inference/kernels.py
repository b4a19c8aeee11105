"""What one step of decoding computes on a CPU, as numba kernels over float32 rows: one row per token.

With few tokens a matrix product is bound by reading the weights, and libraries made for large products reach a fraction
of the memory's bandwidth there. `multiply` streams each matrix once. Every kernel computes a token's row in the same
order whatever else is in the batch and however many threads there are, so its result depends on neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.compiled import kernel
from inference.crew import share
from inference.vectors import (
    GROUP,
    lower,
    multiply_add,
    narrowed,
    number,
    power_of_two,
    prefetch,
    total,
    upper,
    widened,
    zeros,
)

AHEAD = 8192  # elements, at least, between what is multiplied and what is asked for
FLOAT32 = np.empty(0, np.float32)
GELU, SQUARED_RELU, SWIGLU = 0, 1, 2

Four = tuple[float, float, float, float]
Rows = tuple[int, int, int, int]


@kernel
def multiply(
    thread: int,
    threads: int,
    kind: Any,
    matrix: Any,
    bias: Any,
    x: Any,
    tokens: int,
    out: Any,
    first: int,
    rows: int,
    adding: bool,
) -> None:
    """Put `x[:tokens]` times a transposed matrix of `rows` rows into `out[:tokens, first : first + rows]`.

    This thread does its share of the rows. `x` is as wide as the matrix, a multiple of 32. `matrix` is three addresses:
    of the numbers, stored as those of the empty array `kind` (see `vectors.lower`); of a float32 scale per row, or 0;
    of a scale per group. `adding` adds to what is there; `bias[first : first + rows]` is added too, unless it is empty.
    """
    weight, row_scale, group_scale, width = matrix[0], matrix[1], matrix[2], x.shape[1]
    begin, end = share((rows + 3) // 4, thread, threads)
    for block in range(begin, end):
        r, last = 4 * block, rows - 1
        four = r, min(r + 1, last), min(r + 2, last), min(r + 3, last)
        token = 0
        while token + 4 <= tokens:
            a, b, c, d = _four_times(kind, weight, group_scale, four, width, x.ctypes.data, token * width)
            _store(a, row_scale, bias, out[token], first, four, adding)
            _store(b, row_scale, bias, out[token + 1], first, four, adding)
            _store(c, row_scale, bias, out[token + 2], first, four, adding)
            _store(d, row_scale, bias, out[token + 3], first, four, adding)
            token += 4
        while token < tokens:
            found = _once(kind, weight, group_scale, four, width, x.ctypes.data, token * width)
            _store(found, row_scale, bias, out[token], first, four, adding)
            token += 1


@kernel
def _store(values: Four, row_scale: int, bias: Any, out: Any, first: int, rows: Rows, adding: bool) -> None:
    for i in range(4):
        row, value = rows[i], values[i]
        if i > 0 and row == rows[i - 1]:  # a matrix whose height is no multiple of four ends in repetitions
            break
        if row_scale:
            value *= number(FLOAT32, row_scale, row)
        if bias.size:
            value += bias[first + row]
        out[first + row] = out[first + row] + value if adding else value


@kernel
def _once(kind: Any, weight: int, scale: int, rows: Rows, width: int, x: int, start: int) -> Four:
    """The products of four rows of a matrix with the vector from element `start` of `x` on."""
    r0, r1, r2, r3 = rows[0] * width, rows[1] * width, rows[2] * width, rows[3] * width
    ahead = (AHEAD // (4 * width) + 1) * 4 * width
    s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
    for j in range(0, width, GROUP):
        prefetch(kind, weight, r0 + 4 * j + ahead)
        u, v = lower(FLOAT32, x, 0, start + j), upper(FLOAT32, x, 0, start + j)
        s0 = multiply_add(lower(kind, weight, scale, r0 + j), u, s0)
        s1 = multiply_add(lower(kind, weight, scale, r1 + j), u, s1)
        s2 = multiply_add(lower(kind, weight, scale, r2 + j), u, s2)
        s3 = multiply_add(lower(kind, weight, scale, r3 + j), u, s3)
        s0 = multiply_add(upper(kind, weight, scale, r0 + j), v, s0)
        s1 = multiply_add(upper(kind, weight, scale, r1 + j), v, s1)
        s2 = multiply_add(upper(kind, weight, scale, r2 + j), v, s2)
        s3 = multiply_add(upper(kind, weight, scale, r3 + j), v, s3)
    return total(s0), total(s1), total(s2), total(s3)


@kernel
def _four_times(
    kind: Any, weight: int, scale: int, rows: Rows, width: int, x: int, start: int
) -> tuple[Four, Four, Four, Four]:
    """The same with four vectors, one after another."""
    r0, r1, r2, r3 = rows[0] * width, rows[1] * width, rows[2] * width, rows[3] * width
    ahead = (AHEAD // (4 * width) + 1) * 4 * width
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    c0, c1, c2, c3 = zeros(), zeros(), zeros(), zeros()
    d0, d1, d2, d3 = zeros(), zeros(), zeros(), zeros()
    for j in range(0, width, GROUP):
        prefetch(kind, weight, r0 + 4 * j + ahead)
        w0, w1 = lower(kind, weight, scale, r0 + j), lower(kind, weight, scale, r1 + j)
        w2, w3 = lower(kind, weight, scale, r2 + j), lower(kind, weight, scale, r3 + j)
        x0, x1 = lower(FLOAT32, x, 0, start + j), lower(FLOAT32, x, 0, start + width + j)
        x2, x3 = lower(FLOAT32, x, 0, start + 2 * width + j), lower(FLOAT32, x, 0, start + 3 * width + j)
        a0, a1, a2, a3 = (
            multiply_add(w0, x0, a0),
            multiply_add(w1, x0, a1),
            multiply_add(w2, x0, a2),
            multiply_add(w3, x0, a3),
        )
        b0, b1, b2, b3 = (
            multiply_add(w0, x1, b0),
            multiply_add(w1, x1, b1),
            multiply_add(w2, x1, b2),
            multiply_add(w3, x1, b3),
        )
        c0, c1, c2, c3 = (
            multiply_add(w0, x2, c0),
            multiply_add(w1, x2, c1),
            multiply_add(w2, x2, c2),
            multiply_add(w3, x2, c3),
        )
        d0, d1, d2, d3 = (
            multiply_add(w0, x3, d0),
            multiply_add(w1, x3, d1),
            multiply_add(w2, x3, d2),
            multiply_add(w3, x3, d3),
        )
        w0, w1 = upper(kind, weight, scale, r0 + j), upper(kind, weight, scale, r1 + j)
        w2, w3 = upper(kind, weight, scale, r2 + j), upper(kind, weight, scale, r3 + j)
        x0, x1 = upper(FLOAT32, x, 0, start + j), upper(FLOAT32, x, 0, start + width + j)
        x2, x3 = upper(FLOAT32, x, 0, start + 2 * width + j), upper(FLOAT32, x, 0, start + 3 * width + j)
        a0, a1, a2, a3 = (
            multiply_add(w0, x0, a0),
            multiply_add(w1, x0, a1),
            multiply_add(w2, x0, a2),
            multiply_add(w3, x0, a3),
        )
        b0, b1, b2, b3 = (
            multiply_add(w0, x1, b0),
            multiply_add(w1, x1, b1),
            multiply_add(w2, x1, b2),
            multiply_add(w3, x1, b3),
        )
        c0, c1, c2, c3 = (
            multiply_add(w0, x2, c0),
            multiply_add(w1, x2, c1),
            multiply_add(w2, x2, c2),
            multiply_add(w3, x2, c3),
        )
        d0, d1, d2, d3 = (
            multiply_add(w0, x3, d0),
            multiply_add(w1, x3, d1),
            multiply_add(w2, x3, d2),
            multiply_add(w3, x3, d3),
        )
    return (
        (total(a0), total(a1), total(a2), total(a3)),
        (total(b0), total(b1), total(b2), total(b3)),
        (total(c0), total(c1), total(c2), total(c3)),
        (total(d0), total(d1), total(d2), total(d3)),
    )


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
    vectors, key, other = width // GROUP * GROUP, keys.ctypes.data, query.ctypes.data
    largest, scale = np.float32(-np.inf), np.float32(1.0 / np.sqrt(width))
    for s in range(begin, end):
        sums, row = zeros(), s * width
        for j in range(0, vectors, GROUP):
            sums = multiply_add(lower(keys, key, 0, row + j), lower(FLOAT32, other, 0, j), sums)
            sums = multiply_add(upper(keys, key, 0, row + j), upper(FLOAT32, other, 0, j), sums)
        score = total(sums)
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
