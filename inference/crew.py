"""A few threads that run one kernel together, and meet at barriers inside it.

Starting threads on a piece of work costs tens of microseconds, and waking one that sleeps may cost more, while a step
of decoding consists of fifty pieces of a few microseconds each. So the threads are started once a step, wait for one
another by looking at a counter, and stay awake for a while after a step, in which the next one is likely to come.
"""

from __future__ import annotations

import operator
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import types

from data.compiled import kernel
from inference.vectors import add_atomically, change, look
from model.waiting import Sleep

PATIENCE = 10_000  # looks before a thread lets others have its core
LINGERING = 4000  # looks after that, a millisecond or two, before it goes to sleep between two calls
LINE = 64  # bytes of a line of the cache: each thread has one

_GONE, _READY, _CALLED = 0, 1, 2

_yield_core = types.ExternalFunction("sched_yield", types.int32())


@kernel
def meet(thread: int, threads: int, counter: int) -> None:
    """Wait until all `threads` have come here. At address `counter` is an int64 that was 0 before the first time."""
    if threads == 1:
        return
    before = add_atomically(counter, 1)
    goal = (before // threads + 1) * threads
    looks = 0
    while look(counter) < goal:
        looks += 1
        if looks > PATIENCE:
            _yield_core()


@kernel
def called_again(thread: int, threads: int, counter: int) -> bool:
    """End a call of `Crew.run` when all threads have come here; whether this one is to run the same again.

    That is a thread other than the caller's, where the next call comes soon and with the same arguments.
    """
    state = counter + LINE * thread
    if thread > 0:
        change(state, _GONE, _READY)
        change(state, _CALLED, _READY)
    meet(thread, threads, counter)
    if thread == 0:
        return False
    looks = 0
    while look(state) == _READY:
        looks += 1
        if looks > PATIENCE:
            _yield_core()
        if looks > PATIENCE + LINGERING:
            change(state, _READY, _GONE)
    again: bool = look(state) == _CALLED
    return again


@kernel
def _tell(state: int, what: int) -> bool:
    """Say something to a thread that is ready; whether it was."""
    heard: bool = change(state, _READY, what)
    return heard


@kernel
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """Which of `count` equal pieces of work are those of a thread: from the first to before the second."""
    return count * thread // threads, count * (thread + 1) // threads


@kernel
def take(queue: int, count: int) -> tuple[int, int]:
    """Half of what is left of `count` pieces of work: from the first to before the second, which are equal at its end.

    At address `queue` is an int64, how many have been taken; 0 at the beginning. So a thread that is ahead takes over
    from one whose core has less time for it, or less of the memory's, and seldom asks.
    """
    while True:
        taken = look(queue)
        after = taken + (count - taken + 1) // 2
        if taken >= count or change(queue, taken, after):
            return taken, after


class Crew:
    """`threads` threads, of which the caller's is one."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._others = ThreadPoolExecutor(threads - 1, "decode") if threads > 1 else None
        self._lines = np.zeros((threads, LINE // 8), np.int64)  # the counter, and what the other threads are up to
        self._counter: int = self._lines.ctypes.data
        self._working: dict[int, Future[Any]] = {}
        self._called: tuple[Any, ...] = ()
        # With fewer cores, PyTorch's threads that spin are in the way of these.
        if sys.platform == "linux" and len(os.sched_getaffinity(0)) < 2 * threads - 1:
            weakref.finalize(self, Sleep().end)

    def run(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Call `work(thread, threads, counter, *arguments)` in every thread; see `meet`.

        Work that ends with `called_again` is taken up again without delay where the arguments are the same objects;
        what changes from call to call is what arrays hold.
        """
        call, crew = (work, *arguments), (self._threads, self._counter)
        same = len(call) == len(self._called) and all(map(operator.is_, call, self._called))
        self._called = call
        for thread in range(1, self._threads):
            state = self._counter + LINE * thread
            if not (same and _tell(state, _CALLED)):
                _tell(state, _GONE)
                assert self._others is not None
                self._working[thread] = self._others.submit(_work, self._lines, work, thread, *crew, *arguments)
        work(0, *crew, *arguments)
        for thread, working in self._working.items():
            if self._lines[thread, 0] != _READY:
                working.result()


def _work(lines: Any, work: Callable[..., Any], *arguments: Any) -> None:
    """Do work that looks at `lines`, which are held till it is over, also where the crew is forgotten before."""
    work(*arguments)
