"""A checkpoint laid out in memory that another process can read, so that the file is written beside the training.

Two things are done, of which only the second takes long: `torch.save` writes the state, made of tensors in the shared
memory, to a file that keeps what is small and only notes where in that memory the rest stands; and every tensor is
copied there, straight from the device it lies on. Nothing is copied twice, and what comes out is the archive that
`torch.save` makes, byte for byte.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from model.checkpoint import write_state, write_tensors
from training.copying import Copying, prepare
from training.page_locking import PageLock
from training.writer import Part

ALIGNMENT = 64  # bytes


class Staging:
    """Shared memory for one checkpoint, made when first needed and used again for each later one.

    `descriptor` stays the same as it grows. On a GPU the memory is page-locked, which lets the copies run at the full
    speed of the bus; `say` is told where it cannot be. What a call of `lay_out` returned holds until the next call.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._pages = PageLock(say)
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("checkpoint")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self._memory: mmap.mmap | None = None
        self._address, self._locked = 0, False
        self._copying: Copying | None = None

    def reserve(self, nbytes: int) -> None:
        """Have at least `nbytes`, with every page in place: finding them while training waits would take far longer
        than the copy."""
        if self._memory is not None and len(self._memory) >= nbytes:
            return
        self._release()
        os.ftruncate(self.descriptor, nbytes)
        self._memory = mmap.mmap(self.descriptor, nbytes)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        ctypes.memset(self._address, 0, nbytes)
        self._locked = self._pages.lock(self._address, nbytes)
        if not self._locked:
            prepare(nbytes)

    def lay_out(self, state: dict[str, Any], stream: torch.cuda.Stream | None = None) -> list[Part]:
        """Copy the tensors of `state`; returns the archive, in which an (offset, bytes) pair stands for shared memory.

        Tensors that share their memory share it in the archive, as `torch.save` has it. On a GPU the copies go through
        `stream`, beside whatever it computes meanwhile.
        """
        return self.lay_out_shares(state, [], stream)[0]

    def lay_out_shares(
        self, state: dict[str, Any] | None, tensors: Sequence[Tensor], stream: torch.cuda.Stream | None = None
    ) -> tuple[list[Part], list[Part], list[int]]:
        """The same, and beside it a file of archives of one tensor each, with their lengths in bytes."""
        self.reserve(max(staged_bytes(state) + shares_bytes(tensors), mmap.PAGESIZE))
        self._copying = copying = Copying()
        copies = _Copies(self._memory, copying)
        with self._pages.device(), torch.cuda.stream(stream):
            staged, shares = copies.of(state), [copies.alone(tensor) for tensor in tensors]
        layout, file = (_Layout(self._address, copies.used) for _ in range(2))
        if state is not None:
            write_state(staged, layout)
        lengths = write_tensors(shares, file)
        if stream is not None:
            stream.synchronize()
        copying.run()
        return layout.parts, file.parts, lengths

    def help(self) -> None:
        """Take part in the copying that another thread is at; what it was given must be there until it is done."""
        if self._copying is not None:
            self._copying.help()

    def close(self) -> None:
        """Give the memory back."""
        self._release()
        os.close(self.descriptor)

    def _release(self) -> None:
        if self._locked:
            self._pages.unlock(self._address)
        self._memory, self._locked = None, False


def staged_bytes(state: Any) -> int:
    """Bytes of shared memory that the tensors of `state` take."""
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = _aligned(storage.nbytes())
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(state)
    return sum(storages.values())


def shares_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of shared memory that `tensors` take, each alone."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def stream_after_the_step() -> torch.cuda.Stream | None:
    """A stream of the GPU whose work begins when what it was given so far is done; None where a run is on none."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    return stream


class _Copies:
    """Tensors laid out one after the other in `memory`, `used` bytes of it so far.

    What they hold is copied there when `copying` has run, and what comes from a GPU when its stream is done.
    """

    def __init__(self, memory: mmap.mmap | None, copying: Copying) -> None:
        self.used = 0
        self._memory, self._copying = memory, copying
        self._made: dict[int, UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        """`value` with every tensor in it replaced by its copy."""
        if isinstance(value, Tensor):
            storage = self._storage(value.untyped_storage())
            empty = torch.empty(0, dtype=value.dtype)
            return empty.set_(storage, value.storage_offset(), value.size(), value.stride())
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(item) for item in value)
        return value

    def alone(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` that is contiguous and has no part of anything else in its memory."""
        if tensor.numel() == 0:
            return torch.empty_like(tensor, device="cpu")
        place = self._place(tensor.nbytes)
        copy = torch.empty(0, dtype=tensor.dtype).set_(place).view(tensor.shape)
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            self._copying.add(place.data_ptr(), tensor.data_ptr(), tensor.nbytes, tensor)
            return copy
        return copy.copy_(tensor, non_blocking=True)

    def _storage(self, storage: UntypedStorage) -> UntypedStorage:
        if storage.nbytes() == 0:
            return torch.empty(0).untyped_storage()
        if storage.data_ptr() not in self._made:
            copy = self._made[storage.data_ptr()] = self._place(storage.nbytes())
            if storage.device.type == "cpu":
                self._copying.add(copy.data_ptr(), storage.data_ptr(), storage.nbytes(), storage)
            else:
                copy.copy_(storage, non_blocking=True)
        return self._made[storage.data_ptr()]

    def _place(self, nbytes: int) -> UntypedStorage:
        place = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=self.used)
        self.used += _aligned(nbytes)
        return place.untyped_storage()


class _Layout:
    """A file for `torch.save`: what is written from the shared memory at `address` is noted as a place in it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.parts: list[Part] = []
        self._address, self._nbytes = address, nbytes

    def write(self, data: bytes | memoryview) -> int:
        """Note `data`; returns its length in bytes."""
        count = len(data)
        offset = np.frombuffer(data, np.uint8).ctypes.data - self._address if count else -1
        self.parts.append((offset, count) if 0 <= offset < self._nbytes else bytes(data))
        return count

    def flush(self) -> None:
        """Nothing waits."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
