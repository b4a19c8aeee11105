"""What the device says of itself while a run goes on."""

from __future__ import annotations

import psutil
import torch


def memory_in_use(device: torch.device) -> int:
    """The most bytes that tensors have held on a GPU so far; on a CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def temperature(device: torch.device) -> int | None:
    """Degrees Celsius of a GPU, None where there is none or it does not tell."""
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.temperature(device))
    except Exception:  # drivers and containers refuse in many ways, and nothing hangs on it
        return None
