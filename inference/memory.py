"""Where the weights of a model lie on a CPU: side by side, in large pages."""

from __future__ import annotations

import mmap

import torch
from torch import nn

PAGE = 2 * 2**20  # bytes of a large page
_ALIGNED = 64  # bytes: a line of the cache


def settle_(model: nn.Module) -> None:
    """Move the weights and buffers of `model`, which is not to be trained, together into large pages, in place.

    Reading hundreds of megabytes for every token, a processor spends a good part of the time on finding out where each
    page of 4 KiB is, and stops fetching ahead at its end. Where the system has no large pages to give, or the model is
    small, or on another device than a CPU, nothing changes.
    """
    tensors = [*model.parameters(), *model.buffers()]
    sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
    if not hasattr(mmap, "MADV_HUGEPAGE") or sum(sizes) < PAGE or any(part.device.type != "cpu" for part in tensors):
        return
    memory = mmap.mmap(-1, -(-sum(sizes) // PAGE) * PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
    room = torch.frombuffer(memory, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE
    for tensor, size in zip(tensors, sizes, strict=True):
        place = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.detach())
        tensor.data = place
        start += size
