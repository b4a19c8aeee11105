"""How PyTorch's threads wait for one another on a CPU: awake while the cores are theirs, asleep while others want them.

To wake a thread that sleeps takes longer than most operations of a small model, so threads that sleep at once took
three times as long for a step of the demo as threads that spin. Where another process is busy on the same cores it is
the other way round: a thread that spins takes the time of the very one it waits for. So it is looked at, every second,
whether others are. Others are also the threads of decoding, which wait in a way of their own: those of PyTorch that
still spun after a prompt, or after drawing a token, made a step take twice as long.

GNU's OpenMP spins for some milliseconds; for a moment only while it has more threads than there are cores. So it is
made to sleep by a second team of threads, itself asleep, and to spin again by letting that go. What is computed, and in
which order, is the same either way.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SECONDS = 1.0
TOLERATED = 0.2  # of a core; what a machine does by itself is less
USE = Path("/proc/stat")
ENOUGH = 1 << 18  # elements that PyTorch divides among its threads
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def watch_cores() -> None:
    """Let threads spin or sleep as it suits the machine; call it before `import torch`, which it does not import.

    What the user has set by an environment variable stands.
    """
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's and Intel's OpenMP take one time for good
    if sys.platform == "linux" and os.access(USE, os.R_OK) and not _user_decides():
        CoreWatch(use_of_cores).start()


def _user_decides() -> bool:
    return any(name in os.environ for name in SETTINGS)


class Use(NamedTuple):
    """Processor seconds that a set of cores has given, to all processes and to this one, until a moment on a clock."""

    moment: float
    all: float
    own: float


def use_of_cores() -> Use:
    """The use of the cores that this process may run on since the machine began; what a hypervisor took counts too."""
    wanted = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = (line.split() for line in USE.read_text(encoding="ascii").splitlines())
    # user, nice, system, idle, waiting for disks, interrupts (two kinds), stolen
    ticks = sum(sum(map(int, (*found[:3], *found[5:8]))) for name, *found in lines if name in wanted)
    return Use(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


def crowded(before: Use, after: Use, cores: int, threads: int) -> bool:
    """Whether others have taken more of `cores` than `threads` of this process leave them."""
    others = (after.all - before.all) - (after.own - before.own)
    return others > (cores - threads + TOLERATED) * (after.moment - before.moment)


class CoreWatch(threading.Thread):
    """Reads `use` every second, and keeps OpenMP from spinning while the cores are crowded."""

    def __init__(self, use: Callable[[], Use], seconds: float = SECONDS) -> None:
        super().__init__(name="core-watch", daemon=True)
        self.use, self.seconds = use, seconds
        self.sleep: Sleep | None = None

    def run(self) -> None:
        """Watch until the process ends."""
        before = self.use()
        while True:
            time.sleep(self.seconds)
            after = self.use()
            self._settle(before, after)
            before = after

    def _settle(self, before: Use, after: Use) -> None:
        if "torch" not in sys.modules:
            return
        import torch

        cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
        if threads == 1 or not crowded(before, after, cores, threads):
            if self.sleep is not None:
                self.sleep.end()
            self.sleep = None
        elif self.sleep is None:
            self.sleep = Sleep()


class Sleep:
    """From when it is made until `end`, OpenMP's threads sleep as soon as they wait; several may overlap."""

    _lock = threading.RLock()  # which a thread may hold already: what it throws away there may have had a sleep to end
    _all: set[Sleep] = set()
    _teams: tuple[_Team, ...] = ()

    def __init__(self) -> None:
        import torch

        cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
        begun: list[_Team] = []
        with Sleep._lock:
            try:
                if not Sleep._teams and threads > 1 and not _user_decides():
                    for _ in range((cores - threads) // (threads - 1) + 1):
                        begun.append(_Team())
            except BaseException:
                for team in begun:
                    team.release()
                raise
            Sleep._teams = Sleep._teams or tuple(begun)
            Sleep._all.add(self)
        # A thread that is at work in PyTorch when the process ends would bring it down.
        for team in begun:
            team.asleep.wait()

    def end(self) -> None:
        """Let them spin again, unless another one keeps them from it."""
        with Sleep._lock:
            Sleep._all.discard(self)
            if not Sleep._all:
                for team in Sleep._teams:
                    team.release()
                Sleep._teams = ()


class _Team(threading.Thread):
    """A thread with as many OpenMP threads as PyTorch has, all of them asleep until `release`."""

    def __init__(self) -> None:
        super().__init__(name="sleeping-team", daemon=True)
        self._released, self.asleep = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        import torch

        torch.empty(ENOUGH).fill_(0.0)
        self.asleep.set()
        self._released.wait()

    def release(self) -> None:
        """End the thread, and with it its team."""
        self._released.set()
