"""Products of matrices, as they are stored, with a few vectors: as many passes over the weights as must be.

With few tokens a product is bound by reading the weights, and libraries made for large products reach a fraction of the
memory's bandwidth there. `multiply` streams each matrix once. A row's product with a vector is added up in the same
order whatever else is multiplied and however many threads there are, so the result depends on neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from data.compiled import kernel
from inference.crew import share, take
from inference.products import (
    LARGEST,
    add_products,
    added_up,
    cut,
    exact,
    lanes,
    larger,
    largest,
    no_products,
    no_weights,
    operand,
    prefetch,
    weights,
)
from inference.vectors import LANES, number, numbers, put

FLOAT32, FLOAT64 = np.empty(0, np.float32), np.empty(0, np.float64)
AHEAD = 8192  # elements, at least, between rows that are multiplied with several operands and what is asked for
LEAST = np.float32(1e-30)  # a vector with nothing larger is multiplied as zeros where products are exact

Four = tuple[float, float, float, float]
Rows = tuple[int, int, int, int]


class Operands(NamedTuple):
    """What is multiplied, a row per token: `rows` `(tokens, width)` float32, the width a multiple of 32.

    Where products are exact, every thread makes for itself, by `prepare`, their digits `(threads, tokens, 3 * width)`
    int8, and in `units` `(threads, tokens, 2)` float64 what a sum of products has too much, and what one is worth.
    """

    rows: Any
    digits: Any
    units: Any


@kernel
def prepare(thread: int, kind: Any, operands: Operands, tokens: int) -> None:
    """Make the first rows of `operands` ready to be multiplied with matrices stored as the empty array `kind`."""
    if not exact(kind):
        return
    for token in range(tokens):
        x, digits = operands.rows[token].ctypes.data, operands.digits[thread, token].ctypes.data
        width, peak = operands.rows.shape[1], no_weights(FLOAT32)
        for j in range(0, width, LANES):
            peak = larger(peak, numbers(FLOAT32, x, j))
        height = largest(peak)
        per_unit = np.float32(0.0) if height < LEAST else np.float32(LARGEST) / height
        for j in range(0, width, LANES):
            cut(numbers(FLOAT32, x, j), per_unit, digits, j)
        raised = no_products(kind)
        for j in range(0, width, lanes(kind)):
            raised = add_products(no_weights(kind), operand(kind, digits, j), raised)
        operands.units[thread, token, 0] = added_up(raised)
        operands.units[thread, token, 1] = height / LARGEST


@kernel
def multiply(
    thread: int,
    threads: int,
    queues: Any,
    kind: Any,
    matrix: Any,
    bias: Any,
    operands: Operands,
    tokens: int,
    out: Any,
    first: int,
    rows: int,
    adding: bool,
) -> None:
    """Put `tokens` prepared operands times a transposed matrix into `out[:tokens, first : first + rows]`.

    This thread does its share of the `rows` of the matrix, and then what others have not come to yet of theirs; each
    has a row of `queues`, which begins with 0 (see `crew.take`). `matrix` is three addresses: of the numbers, stored as
    those of the empty array `kind` (see `vectors.read_numbers`); of a float32 scale per row, or 0; of a scale per
    group. `adding` adds to what is there; `bias[first : first + rows]` is added too, unless it is empty.
    """
    weight, row_scale, group_scale, width = matrix[0], matrix[1], matrix[2], operands.rows.shape[1]
    x = operands.digits[thread].ctypes.data if exact(kind) else operands.rows.ctypes.data
    size, added = out.shape[1] * 4, bias.ctypes.data + first * 4 if bias.size else 0
    for turn in range(threads):
        other = (thread + turn) % threads
        begin, end = share(rows, other, threads)
        queue, blocks = queues[other].ctypes.data, (end - begin + 3) // 4
        # Processors fetch ahead of whoever reads straight on, in several places at a time if these are far apart; but
        # of rows that are multiplied more than once, neighbours stay in the cache.
        apart, stride = (blocks, 1) if tokens == 1 else (1, 4)
        block, after = take(queue, blocks)
        while block < after:
            r, token = begin + block * stride, 0
            target, units = out.ctypes.data + first * 4, operands.units[thread].ctypes.data if exact(kind) else 0
            four = r, r + apart, r + 2 * apart, r + 3 * apart
            while not exact(kind) and token + 4 <= tokens:  # sums of digits would not fit into the registers
                found = _four_times(kind, weight, group_scale, four, end, width, x, token * width)
                _store(kind, found[0], units, row_scale, added, target, four, end, adding)
                _store(kind, found[1], units, row_scale, added, target + size, four, end, adding)
                _store(kind, found[2], units, row_scale, added, target + 2 * size, four, end, adding)
                _store(kind, found[3], units, row_scale, added, target + 3 * size, four, end, adding)
                token, target = token + 4, target + 4 * size
            while token + 2 <= tokens:
                pair = _twice(kind, weight, group_scale, four, end, width, x, token * width)
                _store(kind, pair[0], units, row_scale, added, target, four, end, adding)
                _store(kind, pair[1], units + 16, row_scale, added, target + size, four, end, adding)
                token, units, target = token + 2, units + 2 * 16, target + 2 * size
            while token < tokens:
                once = _once(kind, weight, group_scale, four, end, width, x, token * width)
                _store(kind, once, units, row_scale, added, target, four, end, adding)
                token, units, target = token + 1, units + 16, target + size
            block += 1
            if block == after:
                block, after = take(queue, blocks)


@kernel
def _store(
    kind: Any, values: Four, units: int, row_scale: int, bias: int, out: int, rows: Rows, end: int, adding: bool
) -> None:
    """Finish the sums of products of four rows, as far as they are before `end`, and put them where they belong.

    `units`, `row_scale`, `bias` (0 if there is none) and `out` are addresses.
    """
    for i in range(4):
        row, value = rows[i], values[i]
        if row >= end:
            break
        if exact(kind):
            value = (value - number(FLOAT64, units, 0)) * number(FLOAT64, units, 1)
        result = np.float32(value)
        if row_scale:
            result *= number(FLOAT32, row_scale, row)
        if bias:
            result += number(FLOAT32, bias, row)
        put(out, row, number(FLOAT32, out, row) + result if adding else result)


@kernel
def _starts(rows: Rows, end: int, width: int) -> Rows:
    """Where the rows begin; there is none at `end`, and the last one serves instead."""
    last = end - 1
    return rows[0] * width, min(rows[1], last) * width, min(rows[2], last) * width, min(rows[3], last) * width


@kernel
def _once(kind: Any, matrix: int, scale: int, rows: Rows, end: int, width: int, x: int, start: int) -> Four:
    """The products of four rows of a matrix with the operand from element `start` of `x` on."""
    r0, r1, r2, r3 = _starts(rows, end, width)
    s0, s1, s2, s3 = no_products(kind), no_products(kind), no_products(kind), no_products(kind)
    for j in range(0, width, lanes(kind)):
        a = operand(kind, x, start + j)
        s0 = add_products(weights(kind, matrix, scale, r0 + j), a, s0)
        s1 = add_products(weights(kind, matrix, scale, r1 + j), a, s1)
        s2 = add_products(weights(kind, matrix, scale, r2 + j), a, s2)
        s3 = add_products(weights(kind, matrix, scale, r3 + j), a, s3)
    return added_up(s0), added_up(s1), added_up(s2), added_up(s3)


@kernel
def _twice(
    kind: Any, matrix: int, scale: int, rows: Rows, end: int, width: int, x: int, start: int
) -> tuple[Four, Four]:
    """The same with two operands, one after the other."""
    r0, r1, r2, r3 = _starts(rows, end, width)
    a0, a1, a2, a3 = no_products(kind), no_products(kind), no_products(kind), no_products(kind)
    b0, b1, b2, b3 = a0, a1, a2, a3
    next_rows = r0 + (AHEAD // (4 * width) + 1) * 4 * width
    for j in range(0, width, lanes(kind)):
        prefetch(kind, matrix, next_rows + 4 * j)
        w0, w1 = weights(kind, matrix, scale, r0 + j), weights(kind, matrix, scale, r1 + j)
        w2, w3 = weights(kind, matrix, scale, r2 + j), weights(kind, matrix, scale, r3 + j)
        a, b = operand(kind, x, start + j), operand(kind, x, start + width + j)
        a0, a1, a2, a3 = (
            add_products(w0, a, a0),
            add_products(w1, a, a1),
            add_products(w2, a, a2),
            add_products(w3, a, a3),
        )
        b0, b1, b2, b3 = (
            add_products(w0, b, b0),
            add_products(w1, b, b1),
            add_products(w2, b, b2),
            add_products(w3, b, b3),
        )
    return (added_up(a0), added_up(a1), added_up(a2), added_up(a3)), (
        added_up(b0),
        added_up(b1),
        added_up(b2),
        added_up(b3),
    )


@kernel
def _four_times(
    kind: Any, matrix: int, scale: int, rows: Rows, end: int, width: int, x: int, start: int
) -> tuple[Four, Four, Four, Four]:
    """The same with four operands."""
    r0, r1, r2, r3 = _starts(rows, end, width)
    a0, a1, a2, a3 = no_products(kind), no_products(kind), no_products(kind), no_products(kind)
    b0, b1, b2, b3 = a0, a1, a2, a3
    c0, c1, c2, c3 = a0, a1, a2, a3
    d0, d1, d2, d3 = a0, a1, a2, a3
    next_rows = r0 + (AHEAD // (4 * width) + 1) * 4 * width
    for j in range(0, width, lanes(kind)):
        prefetch(kind, matrix, next_rows + 4 * j)
        w0, w1 = weights(kind, matrix, scale, r0 + j), weights(kind, matrix, scale, r1 + j)
        w2, w3 = weights(kind, matrix, scale, r2 + j), weights(kind, matrix, scale, r3 + j)
        a, b = operand(kind, x, start + j), operand(kind, x, start + width + j)
        c, d = operand(kind, x, start + 2 * width + j), operand(kind, x, start + 3 * width + j)
        a0, a1, a2, a3 = (
            add_products(w0, a, a0),
            add_products(w1, a, a1),
            add_products(w2, a, a2),
            add_products(w3, a, a3),
        )
        b0, b1, b2, b3 = (
            add_products(w0, b, b0),
            add_products(w1, b, b1),
            add_products(w2, b, b2),
            add_products(w3, b, b3),
        )
        c0, c1, c2, c3 = (
            add_products(w0, c, c0),
            add_products(w1, c, c1),
            add_products(w2, c, c2),
            add_products(w3, c, c3),
        )
        d0, d1, d2, d3 = (
            add_products(w0, d, d0),
            add_products(w1, d, d1),
            add_products(w2, d, d2),
            add_products(w3, d, d3),
        )
    return (
        (added_up(a0), added_up(a1), added_up(a2), added_up(a3)),
        (added_up(b0), added_up(b1), added_up(b2), added_up(b3)),
        (added_up(c0), added_up(c1), added_up(c2), added_up(c3)),
        (added_up(d0), added_up(d1), added_up(d2), added_up(d3)),
    )
