"""What a run is asked while it is under way: to stop, after the step in progress and a save, or to save and go on."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVE_NOW = getattr(signal, "SIGUSR1", None)
# What `Requests.take` returns. Of several processes the one with the largest has its way.
NOTHING, SAVE, STOP = range(3)


class Requests:
    """What this process has been asked by signals, and by `hours`, the time it has, counted from its own start."""

    def __init__(self, hours: float | None) -> None:
        self.stop: int | None = None
        self.save = False
        self._end = math.inf if hours is None else _process_started() + 3600 * hours
        self._last, self._longest = time.time(), 0.0

    def take(self, seconds_to_save: float) -> int:
        """To be called after every step: NOTHING, SAVE, STOP for the end of its time, or STOP and a signal's number.

        The time is at an end where another step, and a save, might not fit in it.
        """
        now = time.time()
        self._longest = max(now - self._last, 0.9 * self._longest)
        self._last = now
        asked, self.save = (SAVE if self.save else NOTHING), False
        if self.stop is not None:
            return STOP + self.stop
        return STOP if now + 2 * (self._longest + seconds_to_save) >= self._end else asked


def expect_signals() -> None:
    """To be called first of all: until `catch_signals` takes over, there is nothing to save and little to stop.

    SIGUSR1 is ignored. SIGTERM ends a process of its own in the ordinary way; for one of several the launcher speaks.
    """
    if SAVE_NOW is not None:
        signal.signal(SAVE_NOW, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SAVE_NOW})  # the launcher has kept it from us
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, _frame: FrameType | None) -> None:
    print(f"Stopped by {signal.Signals(number).name} before the first step. Nothing was changed.", file=sys.stderr)
    raise SystemExit(128 + number)


def _process_started() -> float:
    import psutil

    return float(psutil.Process().create_time())


@contextmanager
def catch_signals(requests: Requests) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGUSR1 in `requests` instead of dying of them.

    The second request to stop, from a person in a hurry, acts at once. Under torchrun, whose agent may send a signal
    that has already come from elsewhere, repetitions are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number == SAVE_NOW:
            requests.save = True
            return
        if requests.stop is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        requests.stop = requests.stop or number

    noted = filter(None, (signal.SIGINT, signal.SIGTERM, SAVE_NOW))
    previous = {int(number): signal.getsignal(number) for number in noted}
    previous = {number: signal.SIG_DFL if handler is _leave else handler for number, handler in previous.items()}
    for number in previous:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
