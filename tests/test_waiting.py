"""Threads that spin while the cores are theirs, and sleep while others want them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from model.waiting import Sleep, Use, crowded, use_of_cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's /proc")

START = Use(moment=10.0, all=500.0, own=3.0)

BUSY = "import time\nwhile time.process_time() < 0.5: pass"

# By what the watch reads, others have more cores than there are, then none: threads come, and go again.
WATCH = """
import itertools, os, threading, time
import torch
from model.waiting import CoreWatch, Use

others, readings = [1000.0], itertools.count()
def use():
    number = next(readings)
    return Use(moment=number, all=others[0] * number, own=0.0)
def settled(wanted):
    for _ in range(600):
        if (len(os.listdir("/proc/self/task")) > before) == wanted:
            return True
        time.sleep(0.05)

torch.empty(1 << 18).fill_(0.0)
watch = CoreWatch(use, seconds=0.05)
before = len(os.listdir("/proc/self/task")) + 1
watch.start()
crowded = settled(True)
others[0] = -1e6
print(crowded, settled(False))
"""

# Threads of decoding wait in their own way; PyTorch's may spin again only when the last of them are forgotten.
CREWS = """
import os, threading, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch
from inference.crew import Crew

def sleeping():
    time.sleep(0.2)
    return any(thread.name == "sleeping-team" for thread in threading.enumerate())

one, other = Crew(2), Crew(2)
print(sleeping(), end=" ")
del one
print(sleeping(), end=" ")
del other
print(sleeping())
"""

NAMES = "import threading, model.waiting as w; w.watch_cores(); print([t.name for t in threading.enumerate()])"


@pytest.mark.parametrize(
    ("used_by_all", "used_by_this", "threads", "expected"),
    [
        (4.0, 3.9, 2, False),  # all of both cores, by this process
        (4.0, 2.0, 2, True),  # a neighbour has one of the two
        (2.2, 0.0, 2, True),  # whatever this process did itself
        (0.3, 0.0, 2, False),  # what a machine does by itself
        (2.1, 0.1, 1, False),  # a neighbour has the core that this process leaves free
        (4.0, 1.0, 1, True),
    ],
)
def test_cores_are_crowded_where_others_take_what_the_threads_need(
    used_by_all: float, used_by_this: float, threads: int, expected: bool
) -> None:
    after = Use(START.moment + 2.0, START.all + used_by_all, START.own + used_by_this)

    assert crowded(START, after, cores=2, threads=threads) is expected


def test_the_time_of_another_process_is_seen_and_not_as_ones_own() -> None:
    before = use_of_cores()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    after = use_of_cores()

    assert after.moment > before.moment
    assert (after.all - before.all) - (after.own - before.own) > 0.4


def test_a_crowd_brings_a_sleeping_team_which_goes_with_it() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}

    done = subprocess.run([sys.executable, "-c", WATCH], env=environment, capture_output=True, text=True, timeout=300)

    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize(("setting", "watched"), [(None, True), ("GOMP_SPINCOUNT", False), ("OMP_WAIT_POLICY", False)])
def test_what_the_user_has_set_stands(setting: str | None, watched: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    environment |= {} if setting is None else {setting: "5"}

    done = subprocess.run([sys.executable, "-c", NAMES], env=environment, capture_output=True, text=True, check=True)

    assert ("core-watch" in done.stdout) is watched


def test_threads_sleep_while_a_crew_decodes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}

    done = subprocess.run([sys.executable, "-c", CREWS], env=environment, capture_output=True, text=True, timeout=300)

    assert done.stdout.split() == ["True", "True", "False"], done.stderr

    environment["OMP_WAIT_POLICY"] = "active"
    done = subprocess.run([sys.executable, "-c", CREWS], env=environment, capture_output=True, text=True, timeout=300)

    assert done.stdout.split() == ["False", "False", "False"], done.stderr


def test_a_process_may_end_as_soon_as_a_crew_is_made() -> None:
    script = CREWS.partition("print")[0]

    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=300)
        assert done.returncode == 0


def test_what_is_collected_while_another_begins_to_sleep_may_end() -> None:
    """A collection may come at any moment, in the thread that is about to make one."""

    def collected() -> None:
        with Sleep._lock:
            Sleep().end()

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
