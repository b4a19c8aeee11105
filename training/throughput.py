"""How fast the device multiplies matrices: the measure that training is held against."""

from __future__ import annotations

import time

import torch


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Floating-point operations per second of the device's fastest square matrix product in `dtype`.

    Takes about `seconds`, after a warm-up. Measured rather than looked up, since data sheets know neither this CPU, nor
    the clock a GPU holds under load, nor what else the machine is doing.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, deadline = float("inf"), 0.0
    for attempt in range(1000):
        wait_for(device)
        started = time.perf_counter()
        left @ right
        wait_for(device)
        now = time.perf_counter()
        if attempt == 0:
            deadline = now + seconds
            continue
        best = min(best, now - started)
        if now > deadline:
            break
    return 2.0 * size**3 / best


def wait_for(device: torch.device) -> None:
    """Return when `device` has done all that it was given; a CPU has, at any time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
