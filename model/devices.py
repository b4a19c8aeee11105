"""Where a model runs, and in which type its matrix products go fast there."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from config.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name` for the `local_rank`-th process of a machine; `auto` prefers a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device=cuda, but PyTorch finds no GPU here. Use training.device=cpu, or auto.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("training.device=mps, but this is no Mac with a GPU. Use training.device=cpu, or auto.")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs, and process {local_rank + 1} of it needs one of its "
            "own. Start fewer processes."
        )
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that the device has left, with what PyTorch holds in reserve on it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the machine, has no memory left."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 matrix products; a CPU without them is far slower in it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capable = torch.cpu.get_capabilities()
        return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
    return False


def automatic_precision(device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The type that matrix products are fastest in, of those with enough digits."""
    if has_fast_bfloat16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"
