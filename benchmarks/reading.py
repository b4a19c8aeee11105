"""Reading memory as fast as it goes."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.compiled import kernel
from inference.crew import share
from inference.products import add_products, added_up, no_products
from inference.vectors import LANES, numbers

FLOAT32 = np.empty(0, np.float32)


@kernel
def read(thread: int, threads: int, counter: int, address: int, count: int, apart: int, sums: Any) -> None:
    """Add up this thread's share of the `count` ones, float32, at `address`, into `sums[thread]`; `Crew` calls it.

    It reads in `apart` places at a time, 1, 2 or 4; a thread's share is a multiple of 256 numbers.
    """
    begin, end = share(count // (4 * LANES), thread, threads)
    begin, length, together = begin * 4 * LANES, (end - begin) * 4 * LANES // apart, 4 // apart
    second = 1 // together * length + 1 % together * LANES
    third = 2 // together * length + 2 % together * LANES
    fourth = 3 // together * length + 3 % together * LANES
    a, b, c, d = no_products(FLOAT32), no_products(FLOAT32), no_products(FLOAT32), no_products(FLOAT32)
    ones = numbers(FLOAT32, address, begin)
    for i in range(begin, begin + length, LANES * together):
        a = add_products(numbers(FLOAT32, address, i), ones, a)
        b = add_products(numbers(FLOAT32, address, i + second), ones, b)
        c = add_products(numbers(FLOAT32, address, i + third), ones, c)
        d = add_products(numbers(FLOAT32, address, i + fourth), ones, d)
    sums[thread] = added_up(a) + added_up(b) + added_up(c) + added_up(d)
