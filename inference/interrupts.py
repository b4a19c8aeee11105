"""Ctrl-C between steps, not within one."""

from __future__ import annotations

# `signal` is made of these, and looks for the names of handlers as well, which takes longer than all the rest here.
import _signal as signals  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def uninterrupted(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Hold SIGINT back until a call of `function` is done; it then goes to the handler that was there before.

    Python runs signal handlers between any two instructions of the main thread. Threads that wait for one another
    inside the call would then wait for ever, and what they share would be half changed.
    """

    @wraps(function)
    def whole(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        before: Any = signals.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(before):
            return function(*args, **kwargs)
        held = False

        def hold(_signal: int, _frame: object) -> None:
            nonlocal held
            held = True

        signals.signal(signal.SIGINT, hold)
        try:
            return function(*args, **kwargs)
        finally:
            signals.signal(signal.SIGINT, before)
            if held:
                signal.raise_signal(signal.SIGINT)

    return whole
