"""How many requests a host gets at a time from all processes of this user on this machine together.

A request holds one of so many lock files. The system takes a lock away from a process however that ends, so there is
nothing to clean up after a crash. The files lie in the machine's own folder for temporary files: what several machines
share, such as a home folder, could not tell them apart.
"""

from __future__ import annotations

import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from config.errors import UserError
from config.files import disk_errors, try_lock

CONNECTIONS = 4
"""Requests at a time to a host of which nothing else is said."""
LONGEST_PAUSE = 0.05
SECONDS_BEFORE_WORD = 10.0


class Stopped(Exception):
    """What was to be fetched is not wanted any more."""


@contextmanager
def connection(
    url: str, most: int, stop: threading.Event | None = None, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold one of the `most` connections to the host of `url`, once one is free.

    Args:
        stop: ends the wait with `Stopped`.
        waiting: called with what is waited for, and with nothing when it came; without it, standard error is told.
    """
    with _free_slot(url, most, stop or threading.Event(), waiting or _tell):
        yield


def _free_slot(url: str, most: int, stop: threading.Event, waiting: Callable[[str], None]) -> IO[bytes]:
    parts = urlsplit(url)
    folder = _own_folder() / re.sub(r"[^\w.-]", "_", parts.netloc.rpartition("@")[2].lower())
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    began, pause, told = time.monotonic(), 0.005, False
    while True:
        for number in range(most):
            slot = try_lock(folder / f"{number}.lock")
            if slot is not None:
                if told:
                    waiting("")
                return slot
        if not told and time.monotonic() - began > SECONDS_BEFORE_WORD:
            told = True
            waiting(f"{most} of {most} connections to {parts.hostname} are in use on this machine, waiting")
        if stop.wait(pause * random.uniform(0.5, 1.0)):
            raise Stopped
        pause = min(2 * pause, LONGEST_PAUSE)


def _own_folder() -> Path:
    """Where the locks of this user lie; others could hold them for ever, so it must be this user's."""
    folder = Path(tempfile.gettempdir()) / f"quern-{os.getuid() if hasattr(os, 'getuid') else 'connections'}"
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat(follow_symlinks=False).st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user. Set TMPDIR to a folder of yours.")
    return folder


def _tell(why: str) -> None:
    if why:
        print(why, file=sys.stderr)
