"""Being asked to stop: SIGINT and SIGTERM let the step in progress finish and be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Which signal, if any, has asked this process to stop."""

    received: int | None = None


@contextmanager
def catch_signals() -> Iterator[StopSignals]:
    """Note SIGINT and SIGTERM instead of dying of them. The second one, from a person in a hurry, acts at once.

    Under torchrun, whose agent may send a signal that has already come from elsewhere, repetitions are ignored.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if stop.received is not None and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        stop.received = stop.received or number

    previous = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
