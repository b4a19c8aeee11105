"""What is measured while training, on a device that works behind the program."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from training.distributed import Process
from training.meter import Meter


class Queue:
    """A device with `left` seconds of work before it, and the clock; waiting is all that takes time."""

    def __init__(self) -> None:
        self.now = self.left = 0.0

    def wait(self, _device: torch.device) -> None:
        self.now, self.left = self.now + self.left, 0.0


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr("training.meter.wait_for", queue.wait)
    monkeypatch.setattr("training.meter.time", SimpleNamespace(perf_counter=lambda: queue.now))
    return queue


def test_what_the_device_has_still_to_do_is_training(queue: Queue) -> None:
    """The first thing in `aside` that needs a result of a step would otherwise wait for all of it."""
    meter = Meter(Process(0, 1, torch.device("cpu")), peak_flops=1000.0)
    for steps in (1, 10):
        for _ in range(steps):
            meter.add(input_tokens=50, flops_per_token=100.0)
            queue.left += 10.0
        with meter.aside():
            queue.wait(torch.device("cpu"))
        with meter.aside():
            queue.now += 7.0
        reading = meter.read()
        assert reading.tokens_per_second == pytest.approx(5.0)
        assert reading.mfu == pytest.approx(0.5)
        assert reading.seconds_per_step == pytest.approx((10 * steps + 7) / steps)


def test_an_evaluation_between_two_readings_does_not_shake_the_time_that_is_left(queue: Queue) -> None:
    meter, told = Meter(Process(0, 1, torch.device("cpu")), peak_flops=1000.0), []
    for between in (100.0, 0.0, 0.0, 12.0, 0.0):  # the first is a compiler, the other an evaluation
        for _ in range(10):
            meter.add(input_tokens=50, flops_per_token=100.0)
            queue.left += 1.0
        with meter.aside():
            queue.now += between
        told.append(meter.read().seconds_per_step)
    assert told == pytest.approx([11.0, 1.0, 1.0, 42 / 30, 52 / 40])
