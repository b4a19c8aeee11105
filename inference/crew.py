"""A few threads that run one kernel together, and meet at barriers inside it.

Starting threads on a piece of work costs tens of microseconds, and a step of decoding consists of a hundred pieces of a
few microseconds each. So the threads are started once a step, and wait for one another by looking at a counter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import types

from data.compiled import kernel
from inference.vectors import add_atomically

PATIENCE = 2000  # looks at the counter before a thread lets others have its core

_yield_core = types.ExternalFunction("sched_yield", types.int32())


@kernel
def meet(thread: int, threads: int, counter: int) -> None:
    """Wait until all `threads` have come here. At address `counter` is an int64 that was 0 before the first time."""
    if threads == 1:
        return
    before = add_atomically(counter, 1)
    goal = (before // threads + 1) * threads
    looks = 0
    while add_atomically(counter, 0) < goal:
        looks += 1
        if looks > PATIENCE:
            _yield_core()


@kernel
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """Which of `count` equal pieces of work are those of a thread: from the first to before the second."""
    return count * thread // threads, count * (thread + 1) // threads


class Crew:
    """`threads` threads, of which the caller's is one."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._others = ThreadPoolExecutor(threads - 1, "decode") if threads > 1 else None
        self._counter = np.zeros(1, np.int64)

    def run(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Call `work(thread, threads, counter, *arguments)` in every thread; see `meet`."""
        self._counter[0] = 0
        crew = self._threads, self._counter.ctypes.data
        others = (
            [] if self._others is None else [self._others.submit(work, i, *crew, *arguments) for i in range(1, crew[0])]
        )
        work(0, *crew, *arguments)
        for other in others:
            other.result()
